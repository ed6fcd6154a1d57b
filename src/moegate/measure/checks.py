"""Compares every call of a timed graph with float64: moegate by the contract, peers by the share of equal choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moegate.contract import bounds, reference
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec

Calls = Sequence[tuple[int, int]]
Check = Callable[[list[Any], Calls], dict[str, Any]]

MAX_ROWS = 4096  # compared rows of one graph, from all its calls; the float64 program runs on the CPU
_PEER_AGREEMENT = 0.98  # with float32 logits; near-ties may go either way
_PEER_AGREEMENT_BFLOAT16 = 0.7  # bfloat16 logits tie often, and peers promise no order of ties
_PEER_WEIGHT_ERROR = 0.02  # relative; peers may have bfloat16 logits and weights


class Reference:
    """Exact logits of each (source, layer), with the contract's bound, for a sample of at most MAX_ROWS rows."""

    def __init__(
        self,
        spec: RouterSpec,
        tensors: RouterTensors,
        weights: list[Tensor],
        sources: list[Tensor],
        calls: int,
        input_ids: Tensor | None = None,
    ) -> None:
        self.spec, self.tensors, self._weights, self._sources = spec, tensors, weights, sources
        tokens = sources[0].shape[0]
        count = min(tokens, max(1, MAX_ROWS // calls))
        generator = torch.Generator().manual_seed(0)
        rows = torch.randperm(tokens, generator=generator)[:count].sort().values
        self.rows = rows.to(sources[0].device)
        self._input_ids = None if input_ids is None else input_ids[self.rows]
        self._cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._chosen: dict[tuple[tuple[int, int], ...], Routing] = {}

    def logits(self, order: Calls) -> tuple[Tensor, Tensor]:
        """Exact, unrounded logits [calls * rows, R], and the error that the contract allows to each."""
        of_calls = [self._of(*call) for call in order]
        return torch.cat([exact for exact, _ in of_calls]), torch.cat([bound for _, bound in of_calls])

    def input_ids(self, order: Calls) -> Tensor | None:
        """The token ids of the compared rows of all calls."""
        return None if self._input_ids is None else self._input_ids.repeat(len(order))

    def routing(self, order: Calls) -> Routing:
        """The float64 reference's routing of the compared rows of all calls."""
        key = tuple(order)
        if key not in self._chosen:
            exact, _ = self.logits(order)
            if self.spec.logits_dtype == "bfloat16":
                exact = exact.to(torch.bfloat16).double()
            self._chosen[key] = reference.select(exact, self.spec, self.tensors, self.input_ids(order))
        return self._chosen[key]

    def stacked(self, of_calls: list[Tensor]) -> Tensor:
        """One output of all calls -> its compared rows, concatenated."""
        return torch.cat([output[self.rows] for output in of_calls])

    def _of(self, source: int, layer: int) -> tuple[Tensor, Tensor]:
        if (source, layer) not in self._cache:
            hidden, weight = self._sources[source][self.rows], self._weights[layer]
            unrounded = dataclasses.replace(self.spec, logits_dtype="float32")
            exact = reference.router_logits(hidden, weight, unrounded, self.tensors)
            bound = bounds.logit_bound(hidden, weight, exact, self.spec, self.tensors)
            self._cache[source, layer] = exact, bound
        return self._cache[source, layer]


def check_routings(expected: Reference) -> Check:
    """For results that are a `Routing`: the contract, whose bound on the logits enters the margin of the choice."""

    def check(results: list[Any], order: Calls) -> dict[str, Any]:
        routings: list[Routing] = results[: len(order)]
        columns = [None if field[0] is None else expected.stacked(list(field)) for field in zip(*routings, strict=True)]
        exact, bound = expected.logits(order)
        ids = expected.input_ids(order)
        found = verify_routing(
            Routing(*columns),  # type: ignore[arg-type]
            exact,
            expected.spec,
            expected.tensors,
            input_ids=ids,
            logit_error=bound,
        )
        assert columns[0] is not None
        agreement = float(_same_experts(columns[0], expected.routing(order).topk_ids).double().mean())
        content: dict[str, Any] = {"ok": found.ok, "rows": found.rows, "excused": found.excused_rows}
        content["agreement"] = round(agreement, 5)
        return content if found.ok else {**content, "problems": found.problems}

    return check


def check_choice(expected: Reference) -> Check:
    """For peers' results (ids, weights, ...): the share of rows with float64's experts, and the weight error there."""

    def check(results: list[Any], order: Calls) -> dict[str, Any]:
        ids = expected.stacked([result[0] for result in results[: len(order)]]).long()
        weights = expected.stacked([result[1] for result in results[: len(order)]]).double()
        want = expected.routing(order)
        places = ids.argsort(dim=-1)
        want_places = want.topk_ids.long().argsort(dim=-1)
        agrees = _same_experts(ids, want.topk_ids)
        got_weights = weights[:, : ids.shape[1]].gather(-1, places)[agrees]
        want_weights = want.topk_weights.gather(-1, want_places)[agrees]
        scale = want_weights.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
        error = float(((got_weights - want_weights).abs() / scale).amax()) if agrees.any() else float("nan")
        agreement = float(agrees.double().mean())
        needed = _PEER_AGREEMENT if expected.spec.logits_dtype == "float32" else _PEER_AGREEMENT_BFLOAT16
        allowed = _PEER_WEIGHT_ERROR if expected.spec.logits_dtype == "float32" else 4 * _PEER_WEIGHT_ERROR
        ok = agreement >= needed and error <= allowed
        return {"ok": ok, "rows": len(ids), "agreement": round(agreement, 5), "weight_error": error}

    return check


def _same_experts(ids: Tensor, others: Tensor) -> Tensor:
    """[M, k] and [M, k] -> [M], True where a row has the same set in both."""
    return (ids.long().sort(dim=-1).values == others.long().sort(dim=-1).values).all(dim=-1)


def check_logits(expected: Reference) -> Check:
    """For results that are logits [M, R]: the largest error, and the largest share of the contract's bound."""

    def check(results: list[Any], order: Calls) -> dict[str, Any]:
        logits = expected.stacked(list(results[: len(order)])).double()
        exact, bound = expected.logits(order)
        error = (logits - exact).abs()
        share = float((error / bound).amax())
        return {"ok": share <= 1.0, "rows": len(logits), "max_error": float(error.amax()), "share_of_bound": share}

    return check


def check_nothing(results: list[Any], order: Calls) -> dict[str, Any]:
    """For contestants that compute nothing."""
    return {"ok": True}
