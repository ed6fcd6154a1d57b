"""Checks a routing against the contract, row by row."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moegate.contract import bounds
from moegate.contract.bounds import Interval
from moegate.contract.reference import router_logits, rows_of_padding, select
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec

_CHUNK = 4096  # rows that are compared at a time, which bounds the memory of the float64 tensors


@dataclass
class Verdict:
    """What `verify_routing` or `verify_logits` found."""

    rows: int
    excused_rows: int = 0
    """Rows whose expert set differs from the float64 reference's within the contract's margin."""
    max_error: float = 0.0
    """The largest error of a finite logit."""
    share_of_bound: float = 0.0
    """The largest error of a logit, as a share of that logit's bound."""
    problems: list[str] = field(default_factory=list)
    """Breaches of the contract, each naming its first row."""

    @property
    def ok(self) -> bool:
        """True if the routing keeps the contract."""
        return not self.problems

    def breach(self, wrong: Tensor, what: str) -> None:
        """Notes a breach if any row of the mask [M] or [M, ...] is set."""
        rows = wrong.reshape(len(wrong), -1).any(dim=-1) if wrong.numel() else wrong.new_zeros(0)
        if rows.any():
            self.problems.append(f"{what} in {int(rows.sum())} of {self.rows} rows, first row {int(rows.nonzero()[0])}")


def verify_routing(
    routing: Routing,
    logits: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    *,
    input_ids: Tensor | None = None,
    padding: Tensor | None = None,
    logit_error: Tensor | None = None,
) -> Verdict:
    """Checks `routing` against the float64 reference on `logits` [M, R].

    Args:
        routing: A backend's result.
        logits: The backend's own logits, for an exact check of the choice; or exact logits, with `logit_error`.
        spec: What the router computes.
        tensors: The small tensors that the spec asks for.
        input_ids: [M], for hash routing.
        padding: The rows that are padding; see `moegate.route`. Breaches of other rows are counted without them.
        logit_error: [M, R] float64, the bound of the backend's logits around `logits`; None: they are equal.

    Returns:
        The verdict, with no problems if the routing keeps the contract.
    """
    # All tensors are small, and float64 is exact and fast on the CPU.
    logits, input_ids = logits.cpu(), None if input_ids is None else input_ids.cpu()
    routing = Routing(*(tensor if tensor is None else tensor.cpu() for tensor in routing))  # type: ignore[arg-type]
    tensors = RouterTensors(*(tensor if tensor is None else tensor.cpu() for tensor in tensors))
    if padding is not None:
        return _verify_padded(routing, logits, spec, tensors, input_ids, padding.cpu(), logit_error)
    exact_logits = logit_error is None
    error = torch.zeros(logits.shape, dtype=torch.float64) if logit_error is None else logit_error.cpu()

    verdict = Verdict(rows=len(logits))
    ids = routing.topk_ids.long()
    if str(routing.topk_ids.dtype) != f"torch.{spec.topk_ids_dtype}" or ids.shape != (len(logits), spec.top_k):
        verdict.problems.append(f"topk_ids are {routing.topk_ids.dtype} {tuple(ids.shape)}")
        return verdict
    verdict.breach((ids < 0) | (ids >= spec.num_selectable), "ids out of range")
    verdict.breach(ids.sort(dim=-1).values.diff() == 0, "an id twice")
    if verdict.problems:
        return verdict

    expected = select(logits, spec, tensors, input_ids).topk_ids.long()
    if spec.hash_routing or (spec.selects_on_logits and exact_logits):
        verdict.breach(ids != expected, "other ids than the reference")
    else:
        _verify_choice(verdict, ids, expected, bounds.key_interval(logits, spec, tensors, error), spec)
    _verify_weights(verdict, routing, logits, spec, tensors, error)
    return verdict


def _verify_padded(
    routing: Routing,
    logits: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    input_ids: Tensor | None,
    padding: Tensor,
    logit_error: Tensor | None,
) -> Verdict:
    """Rows of padding have id -1 and weight 0; the others are held against the contract without them."""
    is_padding = rows_of_padding(padding, logits)
    kept = ~is_padding
    of_tokens = Routing(*(None if part is None else part[kept] for part in routing))  # type: ignore[arg-type]
    ids, error = (None if part is None else part[kept] for part in (input_ids, logit_error))
    verdict = verify_routing(of_tokens, logits[kept], spec, tensors, input_ids=ids, logit_error=error)
    verdict.rows = len(logits)
    for name, part in routing._replace(logits=None)._asdict().items():
        if part is not None:
            differs = part.unsqueeze(-1).flatten(1) != (-1 if name == "topk_ids" else 0)
            verdict.breach(differs.any(dim=-1) & is_padding, f"{name} of padding")
    return verdict


def _verify_choice(verdict: Verdict, ids: Tensor, expected: Tensor, keys: Interval, spec: RouterSpec) -> None:
    differs = ids.sort(dim=-1).values.ne(expected.sort(dim=-1).values).any(dim=-1)
    verdict.excused_rows = int(differs.sum())

    possible, certain = _possible_groups(keys, spec)
    verdict.breach(~possible.gather(-1, ids), "an expert of a group that cannot be among the best")
    chosen = torch.zeros_like(possible).scatter(1, ids, True)
    rivals = (spec.n_group if spec.select_per_group else 1, -1)  # experts compete within a group, or all with all
    if spec.select_per_group:
        per_group = chosen.unflatten(-1, rivals).sum(dim=-1)
        verdict.breach(per_group != spec.top_k // spec.n_group, "too many or too few experts of a group")
    # No chosen key may be surely below the key of an unchosen expert that is certainly eligible.
    least_chosen = keys.high.masked_fill(~chosen, torch.inf).unflatten(-1, rivals).amin(dim=-1)
    best_left = keys.low.masked_fill(chosen | ~certain, -torch.inf).unflatten(-1, rivals).amax(dim=-1)
    verdict.breach(least_chosen < best_left, "an expert chosen before one with a larger key")
    high, low = keys.high.gather(-1, ids), keys.low.gather(-1, ids)
    verdict.breach(high[:, :-1] < low[:, 1:], "ids out of order")


def _possible_groups(keys: Interval, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Masks [M, E] of experts whose groups may be, and whose groups must be, among the topk_group best."""
    if spec.topk_group == spec.n_group:
        everything = torch.ones_like(keys.low, dtype=torch.bool)
        return everything, everything
    low, high = bounds.group_interval(keys, spec)
    # A group may be in if fewer than topk_group others are surely above it; it must be in if fewer
    # than topk_group others can possibly be above it.
    surely_above = (low[:, None, :] > high[:, :, None]).sum(dim=-1)
    maybe_above = (high[:, None, :] >= low[:, :, None]).sum(dim=-1) - 1  # less itself
    per_group = spec.num_selectable // spec.n_group
    possible, certain = surely_above < spec.topk_group, maybe_above < spec.topk_group
    return possible.repeat_interleave(per_group, dim=-1), certain.repeat_interleave(per_group, dim=-1)


def _verify_weights(
    verdict: Verdict, routing: Routing, logits: Tensor, spec: RouterSpec, tensors: RouterTensors, error: Tensor
) -> None:
    has_nan = logits.isnan().any(dim=-1, keepdim=True)
    ids = routing.topk_ids.long()
    weights, shared = bounds.weight_interval(ids, logits, spec, tensors, error)
    _verify_values(verdict, "topk_weights", routing.topk_weights, weights, has_nan, spec)
    if spec.num_shared_gates:
        _verify_values(verdict, "shared_weights", routing.shared_weights, shared, has_nan, spec)
    if spec.num_zero_experts:
        is_expert = ids < spec.num_experts
        low, high = (end.masked_fill(is_expert, 0).sum(dim=-1, keepdim=True) for end in weights)
        slack = spec.top_k * bounds.U * high.abs()
        mass = None if routing.identity_weight is None else routing.identity_weight[:, None]
        _verify_values(verdict, "identity_weight", mass, Interval(low - slack, high + slack), has_nan, spec)


def _verify_values(
    verdict: Verdict, name: str, values: Tensor | None, allowed: Interval, has_nan: Tensor, spec: RouterSpec
) -> None:
    if values is None or str(values.dtype) != f"torch.{spec.topk_weights_dtype}" or values.shape != allowed.low.shape:
        found = "missing" if values is None else f"{values.dtype} {tuple(values.shape)}"
        verdict.problems.append(f"{name} {found}, not {spec.topk_weights_dtype} {tuple(allowed.low.shape)}")
        return
    limit = torch.finfo(values.dtype).max  # larger values overflow to infinity
    values = values.double().clamp(-limit, limit)
    inside = (values >= allowed.low.clamp(max=limit)) & (values <= allowed.high.clamp(min=-limit))
    verdict.breach(~torch.where(has_nan, values.isnan(), inside), f"{name} outside the bound")


def verify_logits(logits: Tensor, hidden: Tensor, weight: Tensor, spec: RouterSpec, tensors: RouterTensors) -> Verdict:
    """Checks logits [M, R] against float64, with the bound of docs/contract.md."""
    verdict = Verdict(rows=len(hidden))
    hidden, weight, logits = hidden.cpu(), weight.cpu(), logits.cpu()
    tensors = RouterTensors(*(tensor if tensor is None else tensor.cpu() for tensor in tensors))
    exact = router_logits(hidden, weight, replace(spec, logits_dtype="float32"), tensors)
    bound = bounds.logit_bound(hidden, weight, exact, spec, tensors)
    if str(logits.dtype) != f"torch.{spec.logits_dtype}" or logits.shape != exact.shape:
        verdict.problems.append(f"logits are {logits.dtype} {tuple(logits.shape)}")
        return verdict
    error = (logits.double() - exact).abs()
    finite = exact.isfinite() & bound.isfinite()
    verdict.breach((error > bound) & finite | (error.isnan() & finite), "logits outside the bound")
    if finite.any():
        share = error / bound.clamp(min=torch.finfo(torch.float64).tiny)
        verdict.max_error, verdict.share_of_bound = float(error[finite].max()), float(share[finite].max())
    return verdict


def verify_call(
    routing: Routing,
    hidden: Tensor,
    weight: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    input_ids: Tensor | None = None,
    padding: Tensor | None = None,
) -> Verdict:
    """Checks the logits and the choice of a routing against the contract.

    Args:
        routing: A backend's result, with its logits.
        hidden: [M, K].
        weight: [R, K].
        spec: What the router computes.
        tensors: The small tensors that the spec asks for.
        input_ids: [M], for hash routing.
        padding: The rows that are padding; see `moegate.route`.
    """
    result = Verdict(rows=len(hidden))
    if routing.logits is None:
        result.problems.append("no logits returned")
        return result
    wrong = [
        f"{name} has {len(tensor)} rows for {len(hidden)} tokens"
        for name, tensor in routing._asdict().items()
        if tensor is not None and len(tensor) != len(hidden)
    ]
    if wrong:
        result.problems += wrong
        return result
    for start in range(0, len(hidden), _CHUNK):
        rows = slice(start, start + _CHUNK)
        chunk = Routing(*(None if tensor is None else tensor[rows] for tensor in routing))  # type: ignore[arg-type]
        ids = None if input_ids is None else input_ids[rows]
        mask = None if padding is None else rows_of_padding(padding, hidden)[rows]
        where = f"rows from {start}: " if len(hidden) > _CHUNK else ""
        _verify_chunk(result, where, chunk, hidden[rows], weight, spec, tensors, ids, mask)
    return result


def _verify_chunk(
    result: Verdict,
    where: str,
    routing: Routing,
    hidden: Tensor,
    weight: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    input_ids: Tensor | None,
    padding: Tensor | None,
) -> None:
    logits = routing.logits
    assert logits is not None
    exactness = verify_logits(logits, hidden, weight, spec, tensors)
    problems = exactness.problems
    if logits.shape == (len(hidden), spec.num_gate_rows):
        choice = verify_routing(routing, logits, spec, tensors, input_ids=input_ids, padding=padding)
        problems = problems + choice.problems
        result.excused_rows += choice.excused_rows
        result.max_error = max(result.max_error, exactness.max_error)
        result.share_of_bound = max(result.share_of_bound, exactness.share_of_bound)
    result.problems += [where + problem for problem in problems]
