"""docs/contract.md, sections 2 and 4: scores and weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from on_device import select
from routers import SPECS, random_logits, select_arguments, tensors_of

from moegate import RouterSpec
from moegate.contract import limits, reference
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors
from moegate.spec_values import CHOICES


@pytest.mark.parametrize("rows", [3, 200])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
@pytest.mark.parametrize("name", SPECS)
def test_weights_are_within_the_bound(name: str, scale: float, rows: int) -> None:
    spec = SPECS[name]
    tensors = tensors_of(spec)
    arguments = select_arguments(spec, tensors, rows)
    for weights_dtype in ("float32", "bfloat16", "float16"):
        candidate = replace(spec, topk_weights_dtype=weights_dtype)
        logits = scale * random_logits(spec, rows)
        routing = select(logits, candidate, **arguments)
        verdict = verify_routing(routing, logits, candidate, tensors, input_ids=arguments.get("input_ids"))
        assert verdict.problems == []
        wrong = routing._replace(topk_weights=routing.topk_weights * (1.02 if weights_dtype != "float32" else 1.0001))
        verdict = verify_routing(wrong, logits, candidate, tensors, input_ids=arguments.get("input_ids"))
        assert verdict.problems or scale == 30.0, "the bound is no tighter than an error that matters"


def test_weights_do_not_see_the_bias() -> None:
    """DeepSeek-V4-Flash's biases are near 8 (its scores near 1): weights from biased scores are badly wrong."""
    spec = RouterSpec(8, 4, 2, "sqrtsoftplus", "score", renormalize=True)
    logits = torch.tensor([[2.0, -1.0, 0.5, 0.0]])
    bias = torch.tensor([8.0, 9.0, 8.1, 8.05])
    routing = select(logits, spec, e_score_correction_bias=bias)
    assert routing.topk_ids.tolist() == [[1, 0]]
    first, second = (torch.nn.functional.softplus(logits[0, e]).sqrt().item() for e in (1, 0))
    assert routing.topk_weights.tolist()[0] == pytest.approx(
        [first / (first + second), second / (first + second)], rel=1e-6
    )


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("eps", [0.0, 1e-20, 1e-6])
@pytest.mark.parametrize("scoring_func", ["sigmoid", "sqrtsoftplus"])
def test_renormalisation_of_underflowing_scores(scoring_func: str, eps: float, rows: int) -> None:
    """0/0 gives 0, and the weights of tiny sums approach 0 continuously, also beside an eps below the least sum."""
    spec = RouterSpec(8, 4, 2, scoring_func, "score", renormalize=True, renormalize_eps=eps)  # type: ignore[arg-type]
    bias = torch.zeros(4)
    tensors = RouterTensors(e_score_correction_bias=bias)
    for level, expected in ((-1000.0, 0.0), (-1.0, 0.5)):
        routing = select(torch.full((rows, 4), level), spec, e_score_correction_bias=bias)
        assert routing.topk_weights.flatten().tolist() == pytest.approx([expected] * 2 * rows, rel=1e-5)  # 1e-6 of eps
    level, score = (-80.0, 1.804851e-35) if scoring_func == "sigmoid" else (-80.0, 4.248354e-18)
    routing = select(torch.full((rows, 4), level), spec, e_score_correction_bias=bias)
    total = max(2 * score + eps, limits.least_sum(spec))
    assert routing.topk_weights[0, 0].item() == pytest.approx(score / total, rel=1e-4)
    assert verify_routing(routing, torch.full((rows, 4), level), spec, tensors).problems == []


@pytest.mark.parametrize("scoring_func", CHOICES["scoring_func"])
@pytest.mark.parametrize("rows", [1, 40])
def test_small_scores_are_accurate(scoring_func: str, rows: int) -> None:
    """All experts are chosen, those far below the best too: there a formula that cancels shows."""
    spec = RouterSpec(8, 9, 9, scoring_func, "score")  # type: ignore[arg-type]
    tensors = tensors_of(spec)
    logits = torch.linspace(-30, -3, 9 * rows).view(rows, 9)
    routing = select(logits, spec, **select_arguments(spec, tensors, rows))
    assert verify_routing(routing, logits, spec, tensors).problems == []


@pytest.mark.parametrize("rows", [1, 40])
def test_softmax_renormalised_is_softmax_of_selected(rows: int) -> None:
    """Also where the softmax of the chosen experts underflows, because a bias chose them."""
    chosen_by_bias = RouterSpec(8, 4, 2, correction_bias="score", renormalize=True)
    logits = torch.tensor([[500.0, 0.0, -1.0, -2.0]]).expand(rows, -1)
    bias = torch.tensor([0.0, 5.0, 5.0, 0.0])
    routing = select(logits, chosen_by_bias, e_score_correction_bias=bias)
    assert routing.topk_ids[0].tolist() == [1, 2]
    assert routing.topk_weights[0].tolist() == pytest.approx(torch.tensor([0.0, -1.0]).softmax(0).tolist(), rel=1e-6)
    with_eps = replace(chosen_by_bias, renormalize_eps=1e-20)
    assert select(logits, with_eps, e_score_correction_bias=bias).topk_weights[0].tolist() == [0.0, 0.0]


def test_floor() -> None:
    """ERNIE-4.5 clamps the sum instead of adding to it."""
    spec = RouterSpec(8, 4, 1, correction_bias="score", renormalize=True, renormalize_floor=1e-12)
    logits = torch.tensor([[0.0, -35.0, 0.0, 0.0]])
    bias = torch.tensor([0.0, 1.0, 0.0, 0.0])
    share = torch.softmax(logits.double(), -1)[0, 1].item()
    weight = select(logits, spec, e_score_correction_bias=bias).topk_weights.item()
    assert weight == pytest.approx(share / 1e-12, rel=1e-5)


def test_factors() -> None:
    spec = RouterSpec(8, 3, 2, "sigmoid", routed_scaling_factor=2.5, per_expert_scale=True, global_scale=True)
    routing = select(
        torch.tensor([[0.0, -200.0, 200.0]]),
        spec,
        per_expert_scale=torch.tensor([2.0, 3.0, 5.0]),
        global_scale=torch.tensor([0.5]),
    )
    assert routing.topk_ids.tolist() == [[2, 0]]
    assert routing.topk_weights.tolist() == [[1.0 * 2.5 * 0.5 * 5.0, 0.5 * 2.5 * 0.5 * 2.0]]


def test_shared_gates() -> None:
    """Shared gates join the sum and are returned, and are never chosen."""
    spec = RouterSpec(8, 3, 1, "sigmoid", "score", renormalize=True, num_shared_gates=2, routed_scaling_factor=8.0)
    logits = torch.tensor([[0.0, -200.0, -200.0, 200.0, 0.0]])
    routing = select(logits, spec, e_score_correction_bias=torch.zeros(3))
    assert routing.topk_ids.tolist() == [[0]]
    assert routing.topk_weights.tolist() == [[8.0 * 0.25]]
    assert routing.shared_weights is not None
    assert routing.shared_weights.tolist() == [[8.0 * 0.5, 8.0 * 0.25]]


def test_zero_experts() -> None:
    """Zero experts have the ids behind the experts; identity_weight is the sum of their weights."""
    spec = RouterSpec(8, 2, 3, "sigmoid", num_zero_experts=2, routed_scaling_factor=2.0)
    routing = select(torch.tensor([[0.0, -200.0, 200.0, 1e-9], [3.0, 2.0, -200.0, -201.0]]), spec)
    assert routing.topk_ids.tolist() == [[2, 3, 0], [0, 1, 2]]
    assert routing.identity_weight is not None
    assert routing.identity_weight.tolist() == [2.0 * 1.5, 0.0]


def test_the_reference_runs_in_float32_too() -> None:
    """The reference gives the same routing in float32, except for rounding."""
    for spec in SPECS.values():
        tensors = tensors_of(spec)
        logits = random_logits(spec, 20)
        input_ids = select_arguments(spec, tensors, 20).get("input_ids")
        routing = reference.select(logits, spec, tensors, input_ids, dtype=torch.float32)
        dtype = getattr(torch, spec.topk_weights_dtype)
        routing = routing._replace(
            topk_weights=routing.topk_weights.to(dtype),
            identity_weight=None if routing.identity_weight is None else routing.identity_weight.to(dtype),
        )
        assert verify_routing(routing, logits, spec, tensors, input_ids=input_ids).problems == []
