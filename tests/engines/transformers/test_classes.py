"""Every router class of Transformers that moegate claims: what its generated class returns, held against the class."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import router_cases
import torch
import transformers
import transformers_routers
from router_cases import Case
from router_runs import EXCUSED, Run, hold_more_rounded_weights, hold_same_weights, same_experts
from torch import Tensor
from transformers_routers import TransformersRouter, as_routing

from moegate.contract.verify import verify_routing
from moegate.integrations.transformers.classes import STATE, generated, look_at, original
from moegate.integrations.transformers.forms import LEFT, form_of, types_of_classes
from moegate.integrations.transformers.taken import TakenRouter


def class_of(case: Case) -> str:
    return transformers_routers.class_name(case.model_type, case.hash_routing)


CASES = [case for case in router_cases.tiny_cases() if transformers_routers.class_name(case.model_type) not in LEFT]
BY_NAME = {"ids": lambda case: case.name}


def taken_over(run: Run) -> TakenRouter:
    """Gives the run's router the generated class."""
    router = run.router.router
    taken = look_at(router, run.router.config, run.case.layer)
    assert isinstance(taken, TakenRouter), taken
    new = generated(type(router).__name__)
    assert new is not None
    router.__class__ = new
    vars(router)[STATE] = taken
    return taken


@torch.no_grad()
def call(run: Run, hidden: Tensor) -> Any:
    return run.router.router(*run.router.arguments(hidden, run.input_ids))


def unpacked(run: Run, router: TransformersRouter, output: Any) -> transformers_routers.Output:
    logits, weights, ids, shared = router.unpack(output)
    return logits, ids, weights, shared


@pytest.mark.parametrize("case", CASES, **BY_NAME)  # type: ignore[arg-type]
def test_same_router(case: Case) -> None:
    """The same experts and weights as the contract says of the class's spec, in tensors of the same kind."""
    run = Run(case)
    own = call(run, run.hidden)
    spec = taken_over(run).spec_for(run.weight.dtype, run.hidden.dtype)
    vars(run)["spec"] = replace(spec, topk_ids_dtype="int32")
    if spec.logits_dtype == "float32":
        vars(run).pop("hidden")  # drawn for bfloat16 logits, where the spec of the case has these
    ours = call(run, run.hidden)
    hold_same_kind(ours, own)
    routing = as_routing(unpacked(run, run.router, ours), run.exact, run.spec, run.tensors)
    verdict = verify_routing(routing, run.exact, run.spec, run.tensors, input_ids=run.input_ids, logit_error=run.error)
    assert not verdict.problems
    theirs = as_routing(unpacked(run, run.router, call_own(run)), run.exact, run.spec, run.tensors)
    same = same_experts(routing, theirs)
    assert int((~same).sum()) <= (EXCUSED if case.rounded is None else 0.1) * len(same)
    if case.rounded is None:
        hold_same_weights(run, routing, theirs, same)
    else:
        vars(run)["spec"] = replace(run.spec, topk_weights_dtype="float32")  # the roundings are counted
        hold_more_rounded_weights(run, theirs, case.rounded)


def call_own(run: Run) -> Any:
    router = run.router.router
    router.__class__ = type(router).__mro__[1]
    return call(run, run.hidden)


def hold_same_kind(ours: Any, own: Any) -> None:
    assert type(ours) is type(own)
    assert len(ours) == len(own)
    for mine, theirs in zip(ours, own, strict=True):
        assert (mine.dtype, mine.shape, mine.device) == (theirs.dtype, theirs.shape, theirs.device)


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float32"], **BY_NAME)  # type: ignore[arg-type]
def test_what_else_is_returned(case: Case) -> None:
    """Logits, probabilities and scores of all experts, which need no order: equal but for the rounding of sums.

    A float32 product of 64 terms, and what is computed of it, differs by some 1e-6 of the logits' size, 1.25.
    """
    run = Run(case)
    own = call(run, run.hidden)
    taken_over(run)
    for name, mine, theirs in zip(
        form_of(type(run.router.router).__name__).returns, call(run, run.hidden), own, strict=True
    ):
        if name not in ("topk_weights", "topk_ids"):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("hidden_dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "bfloat16"], **BY_NAME)  # type: ignore[arg-type]
def test_dtypes_and_dimensions(case: Case, weight_dtype: str, hidden_dtype: str) -> None:
    """Tensors of the class's kind, whatever the dtypes of weight and hidden_states and the number of dimensions."""
    run = Run(case)
    router = run.router.router
    router.to(getattr(torch, weight_dtype))
    hidden = run.hidden.to(getattr(torch, hidden_dtype)).unflatten(0, (2, -1))
    if run.router.takes_batches or not form_of(type(router).__name__).flattens:
        hidden = hidden.flatten(0, 1)
    try:
        own = call(run, hidden)
    except RuntimeError as error:
        assert "same dtype" in str(error)  # noqa: PT017 # a class that multiplies one dtype alone; moegate takes two
        return
    taken_over(run)
    hold_same_kind(call(run, hidden), own)


@pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.dtype == "float32" and not form_of(class_of(case)).flattens],
    **BY_NAME,  # type: ignore[arg-type]
)
def test_more_dimensions_than_a_class_takes(case: Case) -> None:
    """What the class makes of them, be it an error."""
    run = Run(case)
    hidden = run.hidden.unflatten(0, (2, -1))
    results = []
    for take in (lambda run: None, taken_over):
        take(run)
        try:
            results.append(call(run, hidden))
        except (RuntimeError, IndexError) as error:
            results.append(str(error))
    own, ours = results
    if isinstance(own, str):
        assert ours == own
    else:
        hold_same_kind(ours, own)


# Classes of the catalog that an older release does not have yet.
ABSENT = {"5.23": {"HYV4VLTopkRouter", "Inkling2LoopTopKRouter", "LaraMiniTopKRouter"}}


def test_every_class_of_the_catalog_is_claimed_or_left() -> None:
    claimed = set(map(class_of, CASES))
    absent = {name for name in types_of_classes() if original(name) is None}
    assert claimed | set(LEFT) | absent == set(types_of_classes())
    assert absent == ABSENT.get(transformers.__version__.rpartition(".")[0], set())
