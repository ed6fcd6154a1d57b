"""moegate's routers against Transformers' own classes, for every model type and named model with a class.

Exact logits, in float64, and the error of float32 or bfloat16 logits come from the contract. moegate's routing is
compared on its own logits, exactly where the choice key is the logit; Transformers' routing, on the exact logits and
within the error of its logits.
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
from transformers_routers import as_routing

import moegate
from moegate import Gate, RouterSpec, Routing
from moegate.catalog import Model, models
from moegate.configs.model_types import model_types
from moegate.contract import bounds, reference
from moegate.contract.bounds import BFLOAT16_U
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors

EXCUSED = 0.01
"""The share of rows whose experts may differ from Transformers' within the contract's margin."""


@dataclass(frozen=True)
class Run:
    """One case: the input, Transformers' routing, and the exact routing."""

    case: Case

    @cached_property
    def router(self) -> transformers_routers.TransformersRouter:
        case = self.case
        dtype = getattr(torch, case.dtype)
        return transformers_routers.build(case.model_type, case.overrides, dtype, 0, case.hash_routing)

    @cached_property
    def spec(self) -> RouterSpec:
        spec = RouterSpec.from_config(self.router.config, layer=self.case.layer)
        if self.case.rounded is not None:  # deepseek_v4's spec has float32 logits, Transformers' class bfloat16 ones
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
        return reference.router_logits(
            self.hidden, self.weight, replace(self.spec, logits_dtype="float32"), self.tensors
        )

    @cached_property
    def error(self) -> Tensor:
        return bounds.logit_bound(self.hidden, self.weight, self.exact, self.spec, self.tensors)

    @cached_property
    def theirs(self) -> tuple[Tensor | None, Routing]:
        """Transformers' logits and routing."""
        output = self.router(self.hidden, self.input_ids)
        return output[0], as_routing(output, self.exact, self.spec, self.tensors)

    def ours(self, frozen: bool = True) -> Routing:
        gate = Gate(self.spec, self.weight, **self.tensors._asdict(), frozen=frozen)
        return gate.forward(self.hidden, input_ids=self.input_ids, return_logits=True)


def cases(found: list[Case], rounded: bool) -> pytest.MarkDecorator:
    chosen = [case for case in found if (case.rounded is not None) == rounded]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


@cases(router_cases.tiny_cases(), rounded=False)
def test_model_type(case: Case) -> None:
    compare(Run(case))


@cases([case for case in router_cases.tiny_cases() if case.dtype == "bfloat16"], rounded=False)
def test_whose_weights_are_cast_to_bfloat16(case: Case) -> None:
    """For exactly the classes with casts_weights, a thousand weights are all bfloat16 numbers, which is no chance."""
    run = Run(case)
    weights = run.router(run.hidden, run.input_ids)[2]
    if (factor := model_types()[case.model_type].output_factor) is not None:
        weights = weights / getattr(run.router.config, factor)
    assert weights.equal(weights.to(torch.bfloat16).float()) == case.rounds_weights


@cases(router_cases.full_cases(), rounded=False)
def test_named_model(case: Case) -> None:
    compare(Run(case))


def compare(run: Run) -> None:
    if run.spec.logits_dtype == "bfloat16" and not run.spec.hash_routing:
        assert is_separated(run, run.error).all(), "the input leaves a choice to rounding"
    ours = run.ours()
    hold_ours(run, ours)
    hold_ours(
        run,
        moegate.route(
            run.hidden, run.weight, run.spec, **run.tensors._asdict(), input_ids=run.input_ids, return_logits=True
        ),
    )
    logits, theirs = run.theirs
    hold_their_logits(run, logits, run.error)
    verdict = verify_routing(theirs, run.exact, run.spec, run.tensors, input_ids=run.input_ids, logit_error=run.error)
    assert not verdict.problems
    same = same_experts(ours, theirs)
    assert int((~same).sum()) <= EXCUSED * len(same)
    hold_same_weights(run, ours, theirs, same)


def hold_ours(run: Run, ours: Routing) -> None:
    assert ours.logits is not None
    assert str(ours.logits.dtype) == f"torch.{run.spec.logits_dtype}"
    assert ((ours.logits.double() - run.exact).abs() <= run.error).all()
    verdict = verify_routing(ours, ours.logits, run.spec, run.tensors, input_ids=run.input_ids)
    assert not verdict.problems
    assert verdict.excused_rows <= EXCUSED * verdict.rows


def hold_their_logits(run: Run, logits: Tensor | None, error: Tensor) -> None:
    """The class's logits, some after the multiplier or the soft cap, some without the shared gates."""
    if logits is None:
        assert run.spec.input_norm_eps is not None, "only Gemma-4's class keeps its logits to itself"
        return
    exact = reference.transformed(run.exact, run.spec)[:, : logits.shape[1]]
    error = error * run.spec.logit_multiplier + bounds.transform_error(
        reference.transformed(run.exact, run.spec), run.spec
    )
    assert ((logits.double() - exact).abs() <= error[:, : logits.shape[1]]).all()
    if run.spec.logits_dtype == "bfloat16" and run.spec.logit_softcapping is None:
        assert logits.equal(logits.to(torch.bfloat16).to(logits.dtype)), "these logits are not rounded to bfloat16"


def same_experts(ours: Routing, theirs: Routing) -> Tensor:
    return ours.topk_ids.sort(dim=-1).values.eq(theirs.topk_ids.sort(dim=-1).values).all(dim=-1)


def hold_same_weights(run: Run, ours: Routing, theirs: Routing, same: Tensor) -> None:
    """At equal ids, both weights lie in the contract's interval, so that they differ by its width at most."""
    (our_ids, our_weights), (ids, weights) = (by_id(routing) for routing in (ours, theirs))
    allowed, _ = bounds.weight_interval(ids, run.exact, run.spec, run.tensors, run.error)
    inside = (our_weights - weights).abs() <= allowed.high - allowed.low
    assert inside[same].all()
    assert our_ids[same].equal(ids[same])


def by_id(routing: Routing) -> tuple[Tensor, Tensor]:
    ids, order = routing.topk_ids.long().sort(dim=-1)
    return ids, routing.topk_weights.double().gather(-1, order)


def is_separated(run: Run, error: Tensor, score_error: float = 0.0) -> Tensor:
    """Rows [M] whose k best keys are above all others everywhere in their intervals, so that ties are impossible.

    score_error: the relative error of scores. Where the key is the logit, it means a step of the logit: the same for
    exp in a softmax; 1 / (1 - s) times as long for a sigmoid s.
    """
    if run.spec.selects_on_logits:
        slope = 1 / (1 - torch.sigmoid(run.exact)) if run.spec.scoring_func == "sigmoid" else 1.0
        error, score_error = error + score_error * slope, 0.0
    keys = bounds.key_interval(run.exact, run.spec, run.tensors, error)
    slack = (
        score_error
        * reference.scores_of(reference.transformed(run.exact, run.spec), run.spec)[:, : run.spec.num_selectable]
    )
    chosen = reference.best_first(reference.choice_keys(run.exact, run.spec, run.tensors), run.spec.top_k)
    least = (keys.low - slack).gather(-1, chosen).amin(dim=-1)
    return least > (keys.high + slack).scatter(1, chosen, -torch.inf).amax(dim=-1)


@cases(router_cases.tiny_cases() + router_cases.full_cases(), rounded=True)
def test_more_rounding(case: Case) -> None:
    """Classes with more roundings than a spec can express: the same experts where the roundings cannot swap them."""
    run, rounded = Run(case), case.rounded
    assert rounded is not None
    error = run.error + input_error(run, rounded.of_input)
    logits, theirs = run.theirs
    hold_their_logits(run, logits, error)
    if not run.spec.hash_routing:
        assert is_separated(run, error, rounded.of_score * BFLOAT16_U).all(), "the input leaves a choice to rounding"
    assert same_experts(run.ours(), theirs).all()
    allowed, _ = bounds.weight_interval(theirs.topk_ids.long(), run.exact, run.spec, run.tensors, error)
    relative = rounded.of_weights * BFLOAT16_U
    weights = theirs.topk_weights.double()
    assert ((weights >= allowed.low * (1 - relative)) & (weights <= allowed.high * (1 + relative))).all()


def input_error(run: Run, roundings: int) -> Tensor:
    """The bound on the change of logits when each input is rounded to bfloat16 so many times.

    Each rounding changes a product by at most 2**-8 of the product, up or down. By Hoeffding's inequality, the sum of
    the changes is within 7 times the root of the sum of squares, except for one logit in 10**10.
    """
    if not roundings:
        return torch.zeros_like(run.exact)
    x = reference.normed_input(run.hidden, run.spec, run.tensors, torch.float64)
    error: Tensor = 7 * roundings**0.5 * BFLOAT16_U * (x.square() @ run.weight.double().square().T).sqrt()
    return error


@pytest.mark.parametrize(
    "model", [m for m in models() if router_cases.transformers_type(m)], ids=lambda model: model.name
)
def test_spec_of_named_model(model: Model) -> None:
    """Transformers' config of a named model gives the catalog's spec."""
    model_type = router_cases.transformers_type(model)
    assert model_type is not None
    config = CONFIG_MAPPING[model_type](**router_cases.row_overrides(model))
    config.dtype = torch.bfloat16
    assert RouterSpec.from_config(config) == model.spec


def test_list_of_checked_rows() -> None:
    path = Path(__file__).parents[1] / "docs" / "checked_rows.md"
    assert path.read_text(encoding="utf-8") == router_cases.checked_rows(), (
        "write it anew: python tests/support/router_cases.py > docs/checked_rows.md"
    )
