"""One router of Transformers and one of moegate on the same input, and what holds for both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import transformers_routers
from router_cases import Case, Rounding
from router_inputs import random_hidden, separated_hidden
from torch import Tensor
from transformers_routers import as_routing

from moegate import Gate, RouterSpec, Routing
from moegate.contract import bounds, reference
from moegate.contract.bounds import BFLOAT16_U
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


def hold_more_rounded_weights(run: Run, theirs: Routing, rounded: Rounding) -> None:
    """Weights of a class that rounds more than a spec can say: within these roundings of the contract's interval."""
    error = run.error + input_error(run, rounded.of_input)
    allowed, _ = bounds.weight_interval(theirs.topk_ids.long(), run.exact, run.spec, run.tensors, error)
    relative = rounded.of_weights * BFLOAT16_U
    weights = theirs.topk_weights.double()
    assert ((weights >= allowed.low * (1 - relative)) & (weights <= allowed.high * (1 + relative))).all()
