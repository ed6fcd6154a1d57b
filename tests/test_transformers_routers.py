"""Our routers against Transformers' own classes, for every model type and every named model that has one.

The exact logits, in float64, and the error allowed to float32 or bfloat16 ones come from the contract. Ours are held
against our own logits, exactly where the choice is by logit; Transformers' routing is held against the exact logits,
within the error allowed to its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import pytest
import router_cases
import torch
import transformers_routers
from router_cases import Case
from router_inputs import random_hidden, separated_hidden
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moegate
from moegate import Gate, RouterSpec, Routing
from moegate.catalog import Model, models
from moegate.contract import bounds
from moegate.contract.bounds import BFLOAT16_U, Interval
from moegate.contract.reference import best_first, choice_keys, finite_logits, router_logits, transformed
from moegate.contract.verify import verify_logits, verify_routing
from moegate.routing import RouterTensors

EXCUSED = 0.01
"""The share of rows whose experts may differ from Transformers' within the contract's margin."""

_CLASSES = {"argvalues": [model for model in models() if router_cases.transformers_type(model)], "ids": lambda m: m.name}


@dataclass(frozen=True)
class Run:
    """One case: its input, what Transformers makes of it, and what it should be."""

    case: Case

    @cached_property
    def router(self) -> transformers_routers.TransformersRouter:
        case = self.case
        dtype = getattr(torch, case.dtype)
        return transformers_routers.build(case.model_type, case.overrides, dtype, 0, case.hash_routing)

    @cached_property
    def spec(self) -> RouterSpec:
        spec = RouterSpec.from_config(self.router.config, layer=self.case.layer)
        if self.case.rounded is not None:  # deepseek_v4's spec has float32 logits, Transformers' class has not
            spec = replace(spec, logits_dtype="bfloat16")
        return replace(spec, topk_weights_dtype="bfloat16") if self.case.rounds_weights else spec

    @cached_property
    def weight(self) -> Tensor:
        return self.router.tensors["weight"]

    @cached_property
    def tensors(self) -> RouterTensors:
        return RouterTensors(**{name: tensor for name, tensor in self.router.tensors.items() if name != "weight"})

    @cached_property
    def hidden(self) -> Tensor:
        if self.spec.logits_dtype == "bfloat16" and not self.spec.hash_routing:
            return separated_hidden(self.spec, self.weight, self.tensors, self.case.tokens, seed=1)
        return random_hidden(self.spec, self.case.tokens, getattr(torch, self.case.dtype), seed=1)

    @cached_property
    def input_ids(self) -> Tensor | None:
        if self.tensors.tid2eid is None:
            return None
        return torch.arange(self.case.tokens) % len(self.tensors.tid2eid)

    @cached_property
    def exact(self) -> Tensor:
        return router_logits(self.hidden, self.weight, replace(self.spec, logits_dtype="float32"), self.tensors)

    @cached_property
    def error(self) -> Tensor:
        return bounds.logit_bound(self.hidden, self.weight, self.exact, self.spec, self.tensors)

    @cached_property
    def theirs(self) -> tuple[Tensor | None, Routing]:
        """Transformers' logits and routing; its ids in the order of the exact keys, for its topk need not sort."""
        logits, ids, weights, shared = self.router(self.hidden, self.input_ids)
        if not self.spec.hash_routing:
            keys = choice_keys(finite_logits(self.exact, torch.float64), self.spec, self.tensors)
            order = keys.gather(-1, ids).argsort(dim=-1, descending=True)
            ids, weights = ids.gather(-1, order), weights.gather(-1, order)
        dtype = getattr(torch, self.spec.topk_weights_dtype)
        shared = None if shared is None else shared.to(dtype)
        mass = weights.masked_fill(ids < self.spec.num_experts, 0).sum(dim=-1).to(dtype)
        mass_of_zeros = mass if self.spec.num_zero_experts else None
        return logits, Routing(ids.to(torch.int32), weights.to(dtype), None, shared, mass_of_zeros)

    def ours(self, frozen: bool = True) -> Routing:
        gate = Gate(self.spec, self.weight, **self.tensors._asdict(), frozen=frozen)
        return gate(self.hidden, input_ids=self.input_ids, return_logits=True)


def cases(found: list[Case], rounded: bool) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [c for c in found if (c.rounded is not None) == rounded], ids=lambda c: c.name)


@cases(router_cases.tiny_cases(), rounded=False)
def test_model_type(case: Case) -> None:
    compare(Run(case))


@cases(router_cases.full_cases(), rounded=False)
def test_named_model(case: Case) -> None:
    compare(Run(case))


def compare(run: Run) -> None:
    tie_free = run.spec.logits_dtype == "float32" or run.spec.hash_routing or bool(is_separated(run, 0.0).all())
    assert tie_free, "the input leaves a choice to rounding"
    ours = run.ours()
    hold_ours(run, ours)
    hold_ours(run, moegate.route(
        run.hidden, run.weight, run.spec, **run.tensors._asdict(), input_ids=run.input_ids, return_logits=True
    ))
    logits, theirs = run.theirs
    hold_their_logits(run, logits, run.error)
    verdict = verify_routing(
        theirs, run.exact, run.spec, run.tensors, input_ids=run.input_ids, logit_error=run.error
    )
    assert not verdict.problems
    same = same_experts(ours, theirs)
    assert int((~same).sum()) <= EXCUSED * len(same)
    hold_same_weights(run, ours, theirs, same)


def hold_ours(run: Run, ours: Routing) -> None:
    assert ours.logits is not None
    assert not verify_logits(ours.logits, run.hidden, run.weight, run.spec, run.tensors).problems
    verdict = verify_routing(ours, ours.logits, run.spec, run.tensors, input_ids=run.input_ids)
    assert not verdict.problems
    assert verdict.excused_rows <= EXCUSED * verdict.rows


def hold_their_logits(run: Run, logits: Tensor | None, error: Tensor) -> None:
    """What the class returns as logits: some after the multiplier or the cap, some without the shared gates."""
    if logits is None:
        assert run.spec.input_norm_eps is not None, "only Gemma-4's class keeps its logits to itself"
        return
    exact = transformed(run.exact, run.spec)[:, : logits.shape[1]]
    error = error * run.spec.logit_multiplier + bounds.transform_error(transformed(run.exact, run.spec), run.spec)
    assert ((logits.double() - exact).abs() <= error[:, : logits.shape[1]]).all()
    if run.spec.logits_dtype == "bfloat16" and run.spec.logit_softcapping is None:
        assert logits.equal(logits.to(torch.bfloat16).to(logits.dtype)), "these logits are not rounded to bfloat16"


def same_experts(ours: Routing, theirs: Routing) -> Tensor:
    return ours.topk_ids.sort(dim=-1).values.eq(theirs.topk_ids.sort(dim=-1).values).all(dim=-1)


def hold_same_weights(run: Run, ours: Routing, theirs: Routing, same: Tensor) -> None:
    """At the same ids, both lie in the interval that the contract gives them: they differ by no more than its width."""
    (our_ids, our_weights), (ids, weights) = (by_id(routing) for routing in (ours, theirs))
    allowed, _ = bounds.weight_interval(ids, run.exact, run.spec, run.tensors, run.error)
    inside = (our_weights - weights).abs() <= allowed.high - allowed.low
    assert inside[same].all()
    assert our_ids[same].equal(ids[same])


def by_id(routing: Routing) -> tuple[Tensor, Tensor]:
    ids, order = routing.topk_ids.long().sort(dim=-1)
    return ids, routing.topk_weights.double().gather(-1, order)


def is_separated(run: Run, key_error: float, error: Tensor | None = None) -> Tensor:
    """Rows [M] whose k best keys are above all others, wherever in their intervals, and `key_error` to spare."""
    keys = bounds.key_interval(run.exact, run.spec, run.tensors, run.error if error is None else error)
    chosen = best_first((keys.low + keys.high) / 2, run.spec.top_k)
    low, high = keys.low - key_error * keys.low.abs(), keys.high + key_error * keys.high.abs()
    least = low.gather(-1, chosen).amin(dim=-1)
    return least > high.scatter(1, chosen, -torch.inf).amax(dim=-1)


@cases(router_cases.tiny_cases() + router_cases.full_cases(), rounded=True)
def test_more_rounding(case: Case) -> None:
    """Classes that round more than a spec can say: the same experts where these roundings cannot swap them."""
    run, rounded = Run(case), case.rounded
    assert rounded is not None
    if run.spec.n_group > 1:
        pytest.skip("input with separated groups is not made; float32 covers the groups")
    error = run.error + input_error(run, rounded.of_input)
    logits, theirs = run.theirs
    hold_their_logits(run, logits, error)
    if not run.spec.hash_routing:
        # A relative error of a probability is an absolute one of its logit, and the logit is the key then.
        of_logit = rounded.of_score * BFLOAT16_U if run.spec.selects_on_logits else 0.0
        of_score = 0.0 if run.spec.selects_on_logits else rounded.of_score * BFLOAT16_U
        assert is_separated(run, of_score, error + of_logit).all()
        assert same_experts(run.ours(), theirs).all()
    ids = theirs.topk_ids.long()
    allowed, _ = bounds.weight_interval(ids, run.exact, run.spec, run.tensors, error)
    allowed = widened(allowed, rounded.of_weights * BFLOAT16_U)
    weights = theirs.topk_weights.double()
    assert ((weights >= allowed.low) & (weights <= allowed.high)).all()


def input_error(run: Run, roundings: int) -> Tensor:
    """How far the logits move when each input is rounded so many times to bfloat16.

    Each rounding moves a product by at most 2**-8 of it, up or down: by Hoeffding's inequality their sum stays within
    7 times the root of the sum of their squares, but for one logit in 10**10.
    """
    if not roundings:
        return torch.zeros_like(run.exact)
    from moegate.contract.reference import normed_input

    x = normed_input(run.hidden, run.spec, run.tensors, torch.float64)
    return 7 * roundings**0.5 * BFLOAT16_U * (x.square() @ run.weight.double().square().T).sqrt()


def widened(interval: Interval, relative: float) -> Interval:
    return Interval(interval.low * (1 - relative), interval.high * (1 + relative))


@pytest.mark.parametrize("model", **_CLASSES)
def test_spec_of_named_model(model: Model) -> None:
    """Transformers' config of a named model describes the router that the catalog says."""
    config = CONFIG_MAPPING[router_cases.transformers_type(model)](**router_cases.row_overrides(model))
    config.dtype = torch.bfloat16
    assert RouterSpec.from_config(config) == model.spec


def test_list_of_checked_rows() -> None:
    path = Path(__file__).parents[1] / "docs" / "checked_rows.md"
    assert path.read_text(encoding="utf-8") == router_cases.checked_rows(), (
        "write it anew: python tests/router_cases.py > docs/checked_rows.md"
    )
