"""`RouterSpec`: invalid combinations are refused; the error has the field, the value and what is allowed."""

from __future__ import annotations

import dataclasses
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from moegate import RouterSpec

GROUPS: dict[str, Any] = {"n_group": 4, "topk_group": 2}
BY_SUM: dict[str, Any] = {**GROUPS, "group_score": "topj_sum", "group_score_top_j": 3}
PER_GROUP: dict[str, Any] = {"n_group": 4, "topk_group": 4, "top_k": 8, "select_per_group": True}
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"hidden_size": 0}, "hidden_size = 0; allowed: at least 1"),
    ({"num_experts": 0}, "num_experts = 0"),
    ({"num_experts": 1000, "num_zero_experts": 25}, "num_experts = 1000; allowed: at most 1024 rows .* make 1025"),
    ({"num_zero_experts": -1}, "num_zero_experts = -1; allowed: 0 or more"),
    ({"top_k": 0}, "top_k = 0; allowed: 1 to 16"),
    ({"top_k": 17}, "top_k = 17; allowed: 1 to 16"),
    ({"num_experts": 64, "top_k": 33}, "top_k = 33; allowed: 1 to 32"),
    ({"scoring_func": "relu"}, r"scoring_func = 'relu'; allowed: one of \['softmax', 'sigmoid'"),
    ({"correction_bias": "weight"}, r"correction_bias = 'weight'; allowed: one of \[None, 'score', 'logit'\]"),
    ({"logits_dtype": "float16"}, "logits_dtype = 'float16'"),
    ({"n_group": 3}, "n_group = 3; allowed: a divisor of the 16 selectable experts"),
    ({"n_group": -4}, "n_group = -4"),
    ({"topk_group": 2}, "topk_group = 2; allowed: 1 when n_group is 1"),
    ({"n_group": 4, "topk_group": 5}, "topk_group = 5; allowed: 1 to 4"),
    ({"n_group": 8, "topk_group": 1, "top_k": 3}, "topk_group = 1; allowed: enough groups of 2 experts"),
    ({"n_group": 16, "topk_group": 8}, "n_group = 16; allowed: groups of at least 2 experts"),
    ({"n_group": 4, "topk_group": 2, "hash_routing": True}, "n_group = 4; allowed: 1 with hash_routing"),
    ({"group_score": "mean"}, r"group_score = 'mean'; allowed: one of \['top2_sum', 'max', 'topj_sum'\]"),
    ({**GROUPS, "group_score": "topj_sum"}, "group_score_top_j = None; allowed: 1 to 4, the experts of a group"),
    ({**BY_SUM, "group_score_top_j": 0}, "group_score_top_j = 0; allowed: 1 to 4, the experts of a group"),
    ({**BY_SUM, "group_score_top_j": 5}, "group_score_top_j = 5; allowed: 1 to 4, the experts of a group"),
    ({**GROUPS, "group_score_top_j": 2}, "group_score_top_j = 2; allowed: None with group_score='top2_sum'"),
    ({**GROUPS, "group_score": "max", "group_score_top_j": 1}, "group_score_top_j = 1; allowed: None with group_score"),
    ({"select_per_group": True}, "select_per_group = True; allowed: False when n_group is 1"),
    ({**PER_GROUP, "topk_group": 2}, "topk_group = 2; allowed: n_group=4 with select_per_group"),
    ({**PER_GROUP, "top_k": 6}, "top_k = 6; allowed: a multiple of n_group=4 with select_per_group"),
    ({**PER_GROUP, "top_k": 20}, "top_k = 20; allowed: 1 to 16"),
    (
        {**PER_GROUP, "group_score": "max"},
        "group_score = 'max'; allowed: 'top2_sum', the default, with select_per_group",
    ),
    (
        {**PER_GROUP, "group_score": "topj_sum", "group_score_top_j": 2},
        "group_score = 'topj_sum'; allowed: 'top2_sum', the default, with select_per_group",
    ),
    ({**PER_GROUP, "hash_routing": True}, "n_group = 4; allowed: 1 with hash_routing"),
    ({"hash_routing": True, "correction_bias": "score"}, "correction_bias = 'score'; allowed: None with hash_routing"),
    (
        {"weights_from": "softmax_of_selected", "renormalize": True},
        "renormalize = True; allowed: False with weights_from",
    ),
    ({"scoring_func": "identity", "renormalize": True}, "renormalize = True; allowed: False with scoring_func"),
    ({"renormalize_eps": 1e-20}, "renormalize_eps = 1e-20; allowed: 0.0 without renormalize"),
    ({"renormalize": True, "renormalize_floor": -1.0}, "renormalize_floor = -1.0; allowed: 0 or more, a float32"),
    ({"num_shared_gates": 2}, "num_shared_gates = 2; allowed: 0, unless renormalize"),
    (
        {"num_zero_experts": 2, "scoring_func": "identity"},
        "num_zero_experts = 2; allowed: 0 with scoring_func='identity'",
    ),
    ({"per_expert_scale": True, "num_zero_experts": 4}, "per_expert_scale = True; allowed: False with zero experts"),
    ({"routed_scaling_factor": 0.0}, "routed_scaling_factor = 0.0; allowed: above 0, a normal float32"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor = nan"),
    ({"routed_scaling_factor": 1e300}, "routed_scaling_factor = 1e.300; allowed: above 0, a normal float32"),
    ({"logit_softcapping": 1e-46}, "logit_softcapping = 1e-46"),
    ({"logit_multiplier": -1.0}, "logit_multiplier = -1.0"),
    ({"logit_softcapping": 0.0}, "logit_softcapping = 0.0; allowed: None, or above 0, a normal float32"),
    ({"input_norm_eps": float("inf")}, "input_norm_eps = inf"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=str)
def test_what_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"RouterSpec.{message}"):
        RouterSpec(**{"hidden_size": 8, "num_experts": 16, "top_k": 2, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 2.0}, "top_k must be int, got float 2.0"),
        ({"top_k": True}, "top_k must be int, got bool True"),
        ({"renormalize": 1}, "renormalize must be bool, got int 1"),
        ({**PER_GROUP, "select_per_group": 1}, "select_per_group must be bool, got int 1"),
        ({**BY_SUM, "group_score_top_j": 2.0}, "group_score_top_j must be int | None, got float 2.0"),
        ({**BY_SUM, "group_score_top_j": True}, "group_score_top_j must be int | None, got bool True"),
        ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor must be float, got str '2.5'"),
        ({"logit_softcapping": True}, "logit_softcapping must be float | None, got bool True"),
    ],
    ids=str,
)
def test_wrong_types_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        RouterSpec(**{"hidden_size": 8, "num_experts": 16, "top_k": 2, **fields})
    assert message in str(error.value)


def test_a_spec_is_a_value() -> None:
    spec = RouterSpec(8, 16, 2)
    assert spec == RouterSpec(8, 16, 2)
    assert len({spec, RouterSpec(8, 16, 2), replace(spec, top_k=3)}) == 2
    with pytest.raises(FrozenInstanceError):
        spec.top_k = 3  # type: ignore[misc]
    assert hash(spec) == hash(replace(spec, routed_scaling_factor=1))


def test_what_follows_from_the_fields() -> None:
    longcat = RouterSpec(8, 512, 12, correction_bias="score", num_zero_experts=256)
    assert (longcat.num_selectable, longcat.num_gate_rows) == (768, 768)
    inkling = RouterSpec(8, 256, 6, "sigmoid", "score", renormalize=True, num_shared_gates=2)
    assert (inkling.num_selectable, inkling.num_gate_rows) == (256, 258)
    assert RouterSpec(8, 16, 2).selects_on_logits
    assert RouterSpec(8, 16, 2, n_group=4, topk_group=2, group_score="max").selects_on_logits
    assert not RouterSpec(8, 16, 2, n_group=4, topk_group=2).selects_on_logits
    assert not longcat.selects_on_logits
    per_group = RouterSpec(8, 16, **PER_GROUP)
    assert per_group.selects_on_logits
    assert not replace(per_group, correction_bias="score").selects_on_logits
    assert RouterSpec(8, 16, 16, n_group=16, topk_group=16, select_per_group=True).selects_on_logits
    by_sum = RouterSpec(8, 16, 2, **BY_SUM)
    assert not by_sum.selects_on_logits
    keys = [each.num_group_score_keys for each in (by_sum, longcat, replace(longcat, group_score="max"))]
    assert keys == [3, 2, 1]
    assert RouterSpec(8, 16, 2, renormalize=True).softmax_over_selected
    assert not RouterSpec(8, 16, 2, renormalize=True, renormalize_eps=1e-20).softmax_over_selected


def test_a_copy_in_another_process_computes_its_own_hash() -> None:
    """Strings have other hashes in another process."""
    spec = RouterSpec(64, 8, 2)
    hash(spec)
    again = pickle.loads(pickle.dumps(spec))
    assert vars(again).keys() == {"_text"} | {part.name for part in dataclasses.fields(RouterSpec)}
    assert (again, hash(again)) == (spec, hash(spec))
