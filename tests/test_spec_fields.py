"""Code that looks at some fields of a spec must not ignore the others, nor fields that are added later."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import pytest
import torch
from cuda_kernels import a_problem
from routers import SPECS, random_logits, select_arguments, tensors_of

import moegate
from moegate import RouterSpec, get_spec, ops
from moegate.choice.tables import read, router_kind
from moegate.cli.models import describe
from moegate.cuda.device import Chip
from moegate.flashinfer import limits
from moegate.gemm import router_gemm
from moegate.measure.peers import is_transformers_softmax
from moegate.measure.plain import plain_select
from moegate.selection.select_text import select_text
from moegate.spec_values import CHOICES

BASE = RouterSpec(64, 256, 8, "sigmoid", "score", 8, 4, renormalize=True)  # supported by FlashInfer's top-k
# A change of each field, with further changes where the field needs them.
CHANGED: dict[str, dict[str, Any]] = {
    "hidden_size": {"hidden_size": 128},
    "num_experts": {"num_experts": 128},
    "top_k": {"top_k": 4},
    "scoring_func": {"scoring_func": "sqrtsoftplus"},
    "correction_bias": {"correction_bias": "logit"},
    "n_group": {"n_group": 16},
    "topk_group": {"topk_group": 2},
    "group_score": {"group_score": "max"},
    "group_score_top_j": {"group_score": "topj_sum", "group_score_top_j": 3},
    "select_per_group": {"select_per_group": True, "topk_group": 8},
    "weights_from": {"weights_from": "sigmoid_of_selected"},
    "renormalize": {"renormalize": False},
    "renormalize_eps": {"renormalize_eps": 1e-20},
    "renormalize_floor": {"renormalize_floor": 1e-12},
    "routed_scaling_factor": {"routed_scaling_factor": 2.5},
    "logits_dtype": {"logits_dtype": "bfloat16"},
    "logit_multiplier": {"logit_multiplier": 0.5},
    "logit_softcapping": {"logit_softcapping": 30.0},
    "linear_bias": {"linear_bias": True},
    "weight_dtype": {"weight_dtype": "float32"},
    "topk_ids_dtype": {"topk_ids_dtype": "int64"},
    "topk_weights_dtype": {"topk_weights_dtype": "bfloat16"},
    "per_expert_scale": {"per_expert_scale": True},
    "num_zero_experts": {"num_zero_experts": 256},
    "num_shared_gates": {"num_shared_gates": 2},
    "global_scale": {"global_scale": True},
    "hash_routing": {"hash_routing": True, "correction_bias": None, "n_group": 1, "topk_group": 1},
    "input_norm_eps": {"input_norm_eps": 1e-6},
}
SIZES_AND_FACTORS = {
    *("hidden_size", "num_experts", "top_k", "weight_dtype"),
    *("renormalize_eps", "renormalize_floor", "routed_scaling_factor", "logit_multiplier", "logit_softcapping"),
}
FLASHINFER_TAKES = {
    *("hidden_size", "num_experts", "top_k", "weight_dtype", "linear_bias", "input_norm_eps"),
    *("n_group", "topk_group", "renormalize_eps", "routed_scaling_factor"),
}
H100 = Chip(132, True, 227 << 10)
FIELDS = [field.name for field in dataclasses.fields(RouterSpec)]


@dataclass(frozen=True)
class Newer(RouterSpec):
    """A spec with a field that no other code knows."""

    novelty: bool = False


def test_every_field_has_a_change() -> None:
    assert list(CHANGED) == FIELDS


@pytest.mark.parametrize("name", FIELDS)
def test_the_kind_of_a_router_is_every_field_but_sizes_and_factors(name: str) -> None:
    changed = replace(BASE, **CHANGED[name])
    assert getattr(changed, name) != getattr(BASE, name)
    word = "input_norm" if name == "input_norm_eps" else name
    said, before = (
        [part for part in router_kind(spec).split() if part.partition("=")[0] == word] for spec in (changed, BASE)
    )
    assert (said == before == []) if name in SIZES_AND_FACTORS else (said != before)


@pytest.mark.parametrize("name", FIELDS)
def test_flashinfers_top_k_takes_no_field_that_it_does_not_know(name: str) -> None:
    assert limits.top_k_refuses(BASE) is None
    assert (limits.top_k_refuses(replace(BASE, **CHANGED[name])) is None) == (name in FLASHINFER_TAKES)


def test_a_field_of_which_nobody_has_heard_counts() -> None:
    known, new = (Newer(**dataclasses.asdict(BASE), novelty=novelty) for novelty in (False, True))
    assert router_kind(known) == router_kind(BASE)
    assert router_kind(new) == f"{router_kind(BASE)} novelty=True"
    assert limits.top_k_refuses(known) is None
    assert "not the router of fused_topk_deepseek" in str(limits.top_k_refuses(new))


@pytest.mark.parametrize("novelty", [False, True])
def test_flashinfers_gemms_refuse_a_field_of_which_nobody_has_heard(novelty: bool) -> None:
    spec = Newer(7168, 256, 8, novelty=novelty)
    rounded = Newer(2880, 128, 4, logits_dtype="bfloat16", novelty=novelty)
    of_gemm = limits.gemm_refuses(spec, torch.bfloat16)
    of_tinygemm = limits.tinygemm_refuses(rounded, torch.bfloat16, None)
    assert of_gemm == ("its router GEMMs know no novelty" if novelty else None)
    assert of_tinygemm == ("tinygemm_bf16 knows no novelty" if novelty else None)
    assert is_transformers_softmax(spec) is not novelty


@pytest.mark.parametrize("name", FIELDS)
def test_a_change_of_a_field_changes_what_the_kernels_compute(name: str) -> None:
    """A field that no kernel reads would be dropped in silence; a pinned dtype is that of the tensors."""
    texts = [
        (router_gemm.source(each, router_gemm.tiling_for(each, H100)), select_text(each, aligned=True))
        for each in (a_problem(BASE), a_problem(replace(BASE, **CHANGED[name])))
    ]
    assert (texts[0] != texts[1]) is (name != "weight_dtype")


# A test that needs the other `logits_dtype` has it of `routers.with_bfloat16_logits`.
@pytest.mark.parametrize("name", sorted(CHOICES.keys() - {"logits_dtype"}))
def test_every_allowed_value_is_tried_by_the_contracts_tests(name: str) -> None:
    """Tests over SPECS hold every backend to the float64 reference; a value in none of the specs would be untested."""
    assert {getattr(spec, name) for spec in SPECS.values()} == set(CHOICES[name])


def test_every_scoring_func_has_kernels_of_its_own() -> None:
    texts = [
        select_text(a_problem(RouterSpec(64, 32, 4, name, weights_from="score")), aligned=True)  # type: ignore[arg-type]
        for name in CHOICES["scoring_func"]
    ]
    assert len(set(texts)) == len(CHOICES["scoring_func"])


def test_flashinfers_top_k_refuses_both_kinds_of_groups() -> None:
    by_three = replace(BASE, group_score="topj_sum", group_score_top_j=3)
    assert limits.top_k_refuses(by_three) == "fused_topk_deepseek ranks groups by the sum of two"
    per_group = replace(BASE, topk_group=8, select_per_group=True)
    assert "not the router of fused_topk_deepseek" in str(limits.top_k_refuses(per_group))
    assert limits.top_k_refuses(replace(by_three, n_group=1, topk_group=1)) is None  # one group: nothing is ranked


def test_the_kinds_in_measured_tables_are_those_of_their_models() -> None:
    """Byte for byte, since a kind with another spelling would find no measured time."""
    folder = resources.files("moegate.choice") / "measured"
    tables = [read(file) for file in folder.iterdir() if file.name.endswith(".json")]
    rows = {(row.model, row.shape.router) for table in tables for row in table.rows}
    assert len({router for _, router in rows}) > 10
    assert [(model, router) for model, router in rows if router_kind(get_spec(model)) != router] == []
    assert router_kind(get_spec("deepseek-v3")) == (
        "scoring_func=sigmoid correction_bias=score n_group=8 topk_group=4 renormalize=True"
    )
    assert router_kind(RouterSpec(8, 8, 1, input_norm_eps=1e-6)) == "input_norm"
    assert router_kind(RouterSpec(8, 8, 1)) == "softmax"


def test_a_spec_that_was_written_before_a_field_was_there_still_loads() -> None:
    newer = ("group_score_top_j", "select_per_group")
    for spec in (*SPECS.values(), get_spec("deepseek-v3")):
        text = ops.spec_text(spec)
        assert ops._spec(text) == spec
        old = {name: value for name, value in json.loads(text).items() if name not in newer}
        if not spec.select_per_group and spec.group_score != "topj_sum":
            assert ops._spec(json.dumps(old)) == spec


@pytest.mark.parametrize("scoring_func", CHOICES["scoring_func"])
def test_every_score_has_a_phrase(scoring_func: str) -> None:
    assert describe(RouterSpec(64, 8, 2, scoring_func))  # type: ignore[arg-type]


def test_groups_in_a_phrase() -> None:
    assert describe(BASE) == "sigmoid + bias, 4 of 8 groups, renorm"
    assert (
        describe(replace(BASE, select_per_group=True, topk_group=8)) == "sigmoid + bias, 1 of each of 8 groups, renorm"
    )
    by_three = replace(BASE, group_score="topj_sum", group_score_top_j=3)
    assert describe(by_three) == "sigmoid + bias, 4 of 8 groups by their best 3, renorm"


@pytest.mark.parametrize("name", SPECS)
def test_the_plain_router_chooses_the_same_experts(name: str) -> None:
    """The router of measure/plain.py; on random logits, ties, which it may break otherwise, are rare."""
    spec = SPECS[name]
    tensors, logits = tensors_of(spec), random_logits(spec, 50)
    given = select_arguments(spec, tensors, 50)
    ids, weights = plain_select(spec, tensors, given.get("input_ids"))(logits)
    routing = moegate.select(logits, replace(spec, topk_weights_dtype="float32"), **given)
    assert ids.equal(routing.topk_ids.int())
    shared = routing.shared_weights
    expected = routing.topk_weights if shared is None else torch.cat([routing.topk_weights, shared], dim=-1)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-7)  # exp is off by ulps
