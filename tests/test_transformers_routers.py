"""moegate's routers against Transformers' own classes, for every model type and named model with a class.

Exact logits, in float64, and the error of float32 or bfloat16 logits come from the contract. moegate's routing is
compared on its own logits, exactly where the choice key is the logit; Transformers' routing, on the exact logits and
within the error of its logits.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import router_cases
import torch
import transformers_routers
from router_cases import Case
from router_runs import (
    EXCUSED,
    Run,
    hold_more_rounded_weights,
    hold_same_weights,
    hold_their_logits,
    input_error,
    is_separated,
    same_experts,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moegate
from moegate import RouterSpec, Routing
from moegate.catalog import Model, models
from moegate.configs.model_types import model_types
from moegate.contract.bounds import BFLOAT16_U
from moegate.contract.verify import verify_routing


def cases(found: list[Case], rounded: bool) -> pytest.MarkDecorator:
    chosen = [case for case in found if (case.rounded is not None) == rounded]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def test_the_installed_transformers_has_every_class() -> None:
    assert set(transformers_routers.model_types()) == {name for name, entry in model_types().items() if entry.router}


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
    hold_more_rounded_weights(run, theirs, rounded)


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
