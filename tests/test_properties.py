"""Random specs, random and hostile logits: `select` against the reference, and invariants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import select
from routers import generator, select_arguments, tensors_of
from torch import Tensor

from moegate import RouterSpec, Routing
from moegate.contract.reference import choice_keys, eligible_experts, finite_logits, group_scores
from moegate.contract.reference import select as reference_select
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors

SEEDS = st.integers(0, 2**31 - 1)
MAX_ROWS = 40  # covers the torch backend's paths for few and for many rows
MAX = torch.finfo(torch.float32).max
HOSTILE = (0.0, -0.0, 1.0, -1.0, 1e-38, -1e-42, 88.0, -88.0, 104.0, 3e38, -3e38, MAX, -MAX)
HOSTILE_LAST = (torch.inf, -torch.inf, torch.nan)


@st.composite
def specs(draw: st.DrawFn) -> RouterSpec:
    """Any valid spec."""
    fields: dict[str, Any] = {}
    n_group = draw(st.sampled_from([1, 1, 2, 4, 8]))
    per_group = draw(st.sampled_from([1, 2, 3, 7, 15, 32]) if n_group > 1 else st.sampled_from([1, 2, 7, 60, 258, 288]))
    selectable = n_group * per_group
    fields["num_zero_experts"] = draw(st.integers(0, min(5, selectable - 1)))
    fields["num_experts"] = selectable - fields["num_zero_experts"]
    fields["scoring_func"] = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus", "identity"]))
    fields["correction_bias"] = draw(st.sampled_from([None, "score", "logit"]))
    weights_from = ["softmax_of_selected", "sigmoid_of_selected"]
    if fields["scoring_func"] != "identity" or fields["num_zero_experts"] == 0:
        weights_from += ["score", "score"]
    fields["weights_from"] = draw(st.sampled_from(weights_from))
    topk_group = 1
    if n_group > 1:
        topk_group = draw(st.integers(1, n_group))
        score = draw(st.sampled_from(["top2_sum", "max", "topj_sum"] if per_group > 1 else ["max", "topj_sum"]))
        fields |= {"n_group": n_group, "topk_group": topk_group, "group_score": score}
        if score == "topj_sum":
            fields["group_score_top_j"] = draw(st.integers(1, per_group))
    fields["top_k"] = draw(st.integers(1, min(32, topk_group * per_group)))
    if n_group > 1 and draw(st.integers(0, 2)) == 0:
        share = draw(st.integers(1, min(32 // n_group, per_group)))
        fields |= {"select_per_group": True, "topk_group": n_group, "top_k": share * n_group}
        fields |= {"group_score": "top2_sum", "group_score_top_j": None}
    can_renormalize = fields["weights_from"] == "sigmoid_of_selected" or (
        fields["weights_from"] == "score" and fields["scoring_func"] != "identity"
    )
    if can_renormalize and draw(st.booleans()):
        fields["renormalize"] = True
        fields["renormalize_eps"] = draw(st.sampled_from([0.0, 1e-20, 1e-6]))
        fields["renormalize_floor"] = draw(st.sampled_from([0.0, 1e-12]))
        if fields["weights_from"] == "score" and fields["scoring_func"] in ("sigmoid", "sqrtsoftplus"):
            fields["num_shared_gates"] = draw(st.integers(0, 2))
    if n_group == 1 and fields["num_zero_experts"] == 0 and draw(st.integers(0, 4)) == 0:
        fields |= {"hash_routing": True, "correction_bias": None}
    fields["per_expert_scale"] = fields["num_zero_experts"] == 0 and draw(st.booleans())
    fields["global_scale"] = draw(st.booleans())
    fields["routed_scaling_factor"] = draw(st.sampled_from([1.0, 2.5, 16.0]))
    fields["logit_multiplier"] = draw(st.sampled_from([1.0, 1.0, 0.1767767, 3.0]))
    fields["logit_softcapping"] = draw(st.sampled_from([None, None, 4.0, 30.0]))
    fields["topk_ids_dtype"] = draw(st.sampled_from(["int32", "int32", "int64"]))
    fields["topk_weights_dtype"] = draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"]))
    return RouterSpec(hidden_size=16, **fields)


def tie_full(spec: RouterSpec, rows: int, seed: int, dtype: torch.dtype) -> Tensor:
    g = generator(seed)
    return (torch.randn(rows, spec.num_gate_rows, generator=g) * 2).round().to(dtype) / 2


def tie_free(spec: RouterSpec, rows: int, seed: int) -> Tensor:
    """Distinct logits, far apart: each row is a permutation of a grid."""
    g = generator(seed)
    size = spec.num_gate_rows
    grid = torch.linspace(-4, 4, size)
    return grid[torch.rand(rows, size, generator=g).argsort(dim=-1)]


def run(spec: RouterSpec, logits: Tensor, tensors: RouterTensors) -> tuple[Routing, Tensor | None]:
    arguments = select_arguments(spec, tensors, len(logits))
    return select(logits, spec, **arguments), arguments.get("input_ids")


@settings(max_examples=400, deadline=None)
@given(specs(), SEEDS, st.integers(0, MAX_ROWS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_select_equals_the_reference(spec: RouterSpec, seed: int, rows: int, dtype: torch.dtype) -> None:
    """Input without ties gives the same sets, except for rows (1 % at most) that the margin excuses."""
    tensors = tensors_of(spec, seed % 1000)
    for logits, is_tie_free in ((tie_free(spec, rows, seed), True), (tie_full(spec, rows, seed, dtype), False)):
        routing, input_ids = run(spec, logits, tensors)
        verdict = verify_routing(routing, logits, spec, tensors, input_ids=input_ids)
        assert verdict.problems == []
        padding = torch.rand(rows, generator=generator(seed)) < 0.3
        padded = select(logits, spec, **select_arguments(spec, tensors, rows), padding=padding)
        assert verify_routing(padded, logits, spec, tensors, input_ids=input_ids, padding=padding).problems == []
        if is_tie_free and not _ties(logits, spec, tensors):
            assert verdict.excused_rows <= max(1, 0.01 * rows)
            expected = reference_select(logits, spec, tensors, input_ids).topk_ids
            if verdict.excused_rows == 0:
                assert routing.topk_ids.sort(-1).values.equal(expected.sort(-1).values)


def _ties(logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> bool:
    """True if keys or group scores of these distinct logits are equal or nearly so."""
    if spec.hash_routing or spec.selects_on_logits or logits.numel() == 0:
        return False
    keys = choice_keys(finite_logits(logits, torch.float64), spec, tensors)
    is_ranked = spec.topk_group < spec.n_group
    compared = [keys, group_scores(keys, spec)] if is_ranked else [keys]
    return any(bool((part.sort(dim=-1).values.diff() < 1e-5 * part.abs().amax(-1, True)).any()) for part in compared)


@settings(max_examples=400, deadline=None)
@given(specs(), SEEDS, st.integers(1, MAX_ROWS), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_invariants_on_hostile_input(
    spec: RouterSpec, seed: int, rows: int, dtype: torch.dtype, hostile_bias: bool
) -> None:
    """Ids are distinct and in range; weights are NaN in NaN rows only, and not negative; sums are right."""
    g = generator(seed)
    values = torch.tensor(HOSTILE + HOSTILE_LAST)
    shape = (rows, spec.num_gate_rows)
    logits = values[torch.randint(len(values) - seed % 4, shape, generator=g)].to(dtype)  # some without the last few
    tensors = tensors_of(spec, seed % 1000)
    if hostile_bias and spec.correction_bias is not None:
        bias = values[torch.randint(len(values), (spec.num_selectable,), generator=g)]
        tensors = tensors._replace(e_score_correction_bias=bias)
    if tensors.per_expert_scale is not None:
        tensors = tensors._replace(per_expert_scale=tensors.per_expert_scale.abs())
    routing, input_ids = run(spec, logits, tensors)
    assert verify_routing(routing, logits, spec, tensors, input_ids=input_ids).problems == []

    ids, weights = routing.topk_ids, routing.topk_weights
    assert all(len(set(row)) == spec.top_k for row in ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < spec.num_selectable
    is_nan_row = logits.isnan().any(-1)
    assert weights[is_nan_row].isnan().all()
    assert not weights[~is_nan_row].isnan().any()
    if spec.scoring_func != "identity" or spec.weights_from != "score":
        assert (weights[~is_nan_row] >= 0).all()
    if spec.softmax_over_selected and not spec.per_expert_scale and not spec.global_scale:
        total = weights[~is_nan_row].double().sum(-1) / spec.routed_scaling_factor
        assert (total - 1).abs().lt(0.02).all()  # bfloat16 weights: 32 roundings of 2**-9 each
    if spec.n_group > 1:
        keys = choice_keys(finite_logits(logits, torch.float64), spec, tensors)
        groups = ids.long() // (spec.num_selectable // spec.n_group)
        assert all(len(set(row)) <= spec.topk_group for row in groups.tolist())
        per_group = spec.num_selectable // spec.n_group
        if spec.select_per_group:
            per_group = spec.top_k // spec.n_group
            assert all(row.count(group) == per_group for row in groups.tolist() for group in range(spec.n_group))
        assert eligible_experts(keys, spec).sum(-1).eq(spec.topk_group * per_group).all()


@settings(max_examples=400, deadline=None)
@given(specs(), SEEDS, st.integers(2, MAX_ROWS))
def test_rows_are_independent(spec: RouterSpec, seed: int, rows: int) -> None:
    """A row's bits are the same when other rows have ties, NaN or infinities, and in a second call."""
    tensors = tensors_of(spec, seed % 1000)
    logits = torch.randn(rows, spec.num_gate_rows, generator=generator(seed))
    routing, _ = run(spec, logits, tensors)
    again, _ = run(spec, logits, tensors)
    changed = logits.clone()
    changed[-1] = changed[-1, 0] if seed % 3 == 0 else torch.nan if seed % 3 == 1 else torch.inf
    other, _ = run(spec, changed, tensors)
    for first, second, third in zip(routing, again, other, strict=True):
        if first is not None:
            assert second is not None
            assert third is not None
            assert first.equal(second)
            assert first[:-1].equal(third[:-1])


def test_k_equal_to_n_and_odd_sizes() -> None:
    for num_experts in (1, 7, 32):
        spec = RouterSpec(16, num_experts, num_experts, "sigmoid", "score", renormalize=True)
        tensors = tensors_of(spec)
        for rows in (0, 1, MAX_ROWS):
            logits = tie_free(spec, rows, 5)
            routing, _ = run(spec, logits, tensors)
            assert verify_routing(routing, logits, spec, tensors).problems == []
            assert all(sorted(row) == list(range(num_experts)) for row in routing.topk_ids.tolist())


def test_the_verdict_finds_wrong_routings() -> None:
    """The oracle must be able to fail: it finds each kind of damage."""
    spec = RouterSpec(
        16, 24, 4, "sigmoid", "score", 4, 2, renormalize=True, num_zero_experts=4, routed_scaling_factor=2.0
    )
    tensors = tensors_of(spec)
    logits = tie_free(spec, 10, 1)
    right, _ = run(spec, logits, tensors)
    assert verify_routing(right, logits, spec, tensors).problems == []
    ids, weights = right.topk_ids, right.topk_weights
    assert right.identity_weight is not None
    damaged = {
        "an id twice": right._replace(topk_ids=ids[:, [0, 0, 2, 3]]),
        "out of range": right._replace(topk_ids=ids + 28),
        "out of order": right._replace(topk_ids=ids.flip(1), topk_weights=weights.flip(1)),
        "larger key": right._replace(topk_ids=_worst(logits, spec, tensors)),
        "topk_weights outside": right._replace(topk_weights=weights.flip(1)),
        "identity_weight outside": right._replace(identity_weight=right.identity_weight + 0.01),
        "topk_weights torch.float64": right._replace(topk_weights=weights.double()),
    }
    for expected, routing in damaged.items():
        problems = verify_routing(routing, logits, spec, tensors).problems
        assert any(expected in problem for problem in problems), (expected, problems)
    assert verify_routing(right, logits, replace(spec, topk_group=1), tensors).problems


def _worst(logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> Tensor:
    keys = choice_keys(finite_logits(logits, torch.float64), spec, tensors)
    kept = keys.masked_fill(~eligible_experts(keys, spec), torch.inf)
    return kept.sort(dim=-1).indices[:, : spec.top_k].flip(1).int()
