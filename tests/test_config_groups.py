"""Routers that choose the best experts of each group (router_n_groups, Pangu Pro MoE)."""

from __future__ import annotations

from typing import Any

import pytest

from moegate import RouterSpec
from moegate.configs.fields import router_fields
from moegate.configs.model_types import model_types

CONFIG: dict[str, Any] = {"hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 8, "norm_topk_prob": True}
QWEN = [
    *("qwen2_moe", "qwen3_moe", "qwen3_vl_moe_text", "qwen3_omni_moe_text", "qwen3_omni_moe_talker_text"),
    *("qwen3_next", "qwen3_5_moe_text", "qwen4_exp_text", "mellum", "interns1_pro_text", "interns2_mobius_text"),
    *("sdar_moe", "grove_moe"),
]
# Pangu Pro MoE 72B, the routing part: arXiv:2505.21411, table 1; PanguProMoEConfig.
PANGU = {"model_type": "PanguProMoE", "hidden_size": 5120, "num_experts": 64, "num_experts_per_tok": 8}


@pytest.mark.parametrize("model_type", QWEN)
def test_the_best_of_each_group(model_type: str) -> None:
    found = router_fields({**CONFIG, "model_type": model_type, "router_n_groups": 4})
    assert (
        found.fields.items() >= {"n_group": 4, "topk_group": 4, "select_per_group": True, "renormalize": True}.items()
    )


@pytest.mark.parametrize("none", [None, -1, 0, 1])
@pytest.mark.parametrize("model_type", QWEN)
def test_no_groups(model_type: str, none: int | None) -> None:
    config = {**CONFIG, "model_type": model_type}
    spec = RouterSpec.from_config({**config, "router_n_groups": none})
    assert spec == RouterSpec.from_config(config)
    assert spec.n_group == spec.topk_group == 1


def test_inside_a_composite_model() -> None:
    text = {key: value for key, value in CONFIG.items() if key != "model_type"}
    name, fields, _ = router_fields({"model_type": "interns1_pro", "text_config": {**text, "router_n_groups": 8}})
    assert (name, fields["n_group"], fields["select_per_group"]) == ("interns1_pro_text", 8, True)


def test_every_type_that_may_have_such_groups_says_who_follows_the_key() -> None:
    read = {name for name, entry in model_types().items() if "router_n_groups" in entry.read_keys}
    assert read == set(QWEN)
    assert all("router_n_groups" in model_types()[name].differs for name in read)


def test_pangu_pro() -> None:
    spec = RouterSpec.from_config(PANGU)
    assert (spec.n_group, spec.topk_group, vars(spec)["select_per_group"], spec.per_expert_scale) == (8, 8, True, True)
    assert (spec.scoring_func, spec.renormalize, spec.top_k) == ("softmax", False, 8)


def test_qwen_with_groups() -> None:
    spec = RouterSpec.from_config({**CONFIG, "model_type": "qwen3_moe", "router_n_groups": 8})
    assert (spec.n_group, spec.topk_group, vars(spec)["select_per_group"]) == (8, 8, True)
