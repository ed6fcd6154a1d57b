"""From a config.json to a spec: for every form of a config, and for every model type."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers_routers
from router_cases import Case, tiny_cases
from small_configs import QWEN, QWEN_SPEC, RING, V3, V3_SPEC, counting_experts
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moegate import RouterSpec

# Config classes that leave values open.
OPEN = {
    "deepseek_ocr2_text": {"num_experts_per_tok": 6},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "gemma4_text": {"num_experts": 8, "top_k_experts": 2},
    "hunyuan_v1_moe": {"num_experts": 8},
}
# Settings for config classes that have no experts by default.
WITH_EXPERTS = {"gemma4_text": {"enable_moe_block": True}}


@pytest.mark.parametrize("model_type", transformers_routers.model_types())
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    """All defaults except the number of experts, which has none, since published files state it."""
    needed = OPEN.get(model_type, {})
    for left_out in needed:
        rest = WITH_EXPERTS.get(model_type, {}) | {key: value for key, value in needed.items() if key != left_out}
        counted = {key: count for key, count in counting_experts(model_type, 8).items() if key not in needed}
        for config in (CONFIG_MAPPING[model_type](**rest), {"model_type": model_type, **counted, **rest}):
            with pytest.raises(ValueError, match=f"no {left_out}|no experts"):
                RouterSpec.from_config(config)
    needed = needed | WITH_EXPERTS.get(model_type, {})
    spec = RouterSpec.from_config(CONFIG_MAPPING[model_type](**needed))
    counted = counting_experts(model_type, spec.num_experts)
    assert spec == RouterSpec.from_config({"model_type": model_type, **needed, **counted})
    for count in (None, 0):
        with pytest.raises(ValueError, match="no experts"):
            RouterSpec.from_config({"model_type": model_type, **needed, **counting_experts(model_type, count)})


@pytest.mark.parametrize("case", [c for c in tiny_cases() if c.dtype == "float32"], ids=lambda c: c.name)
def test_part_of_a_config(case: Case, tmp_path: Path) -> None:
    """A partial config gives the same spec as the config class, which fills in the other keys, and as a file."""
    config = CONFIG_MAPPING[case.model_type](**case.overrides)
    spec = RouterSpec.from_config({"model_type": case.model_type, **case.overrides}, layer=case.layer)
    assert spec == RouterSpec.from_config(config, layer=case.layer)
    config.save_pretrained(tmp_path)
    assert spec == RouterSpec.from_config(tmp_path, layer=case.layer)


def test_forms_of_a_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(V3), encoding="utf-8")
    keyed = SimpleNamespace(to_dict=lambda: V3)
    for config in (V3, keyed, file, str(file), tmp_path, str(tmp_path)):
        assert RouterSpec.from_config(config) == V3_SPEC
    with pytest.raises(TypeError, match="must be a path, a dict or a configuration with to_dict"):
        RouterSpec.from_config(3)
    with pytest.raises(ValueError, match=r"no file .*config\.json"):
        RouterSpec.from_config(tmp_path / "other" / "config.json")


@pytest.mark.parametrize("path", ["text_config", "language_config", "llm_config", "thinker_config.text_config"])
def test_nested_config(path: str) -> None:
    inner = QWEN
    for name in reversed(path.split(".")):
        inner = {"model_type": "some_composite", "vision_config": {"model_type": "mixtral"}, name: inner}
    assert RouterSpec.from_config(inner) == QWEN_SPEC
    rounded = replace(QWEN_SPEC, logits_dtype="bfloat16")
    assert RouterSpec.from_config({**inner, "dtype": "bfloat16"}) == rounded
    assert RouterSpec.from_config({"dtype": "bfloat16", "text_config": {**QWEN, "dtype": None}}) == rounded
    assert RouterSpec.from_config({"dtype": "bfloat16", "text_config": {**QWEN, "dtype": "float32"}}) == QWEN_SPEC


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_the_model(key: str) -> None:
    for dtype in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        assert RouterSpec.from_config({**QWEN, key: dtype}).logits_dtype == "bfloat16"
    for other in ("float16", "float32", torch.float32, None):
        assert RouterSpec.from_config({**QWEN, key: other}).logits_dtype == "float32"
    assert RouterSpec.from_config({**V3, key: "bfloat16"}).logits_dtype == "float32"  # the class upcasts


def test_deepseek_v3_does_not_save_its_score_function() -> None:
    saved = CONFIG_MAPPING["deepseek_v3"](**V3).to_dict()
    assert "scoring_func" not in saved
    assert RouterSpec.from_config(saved) == V3_SPEC


def test_qwen3_moe_calls_its_experts_local() -> None:
    saved = CONFIG_MAPPING["qwen3_moe"](**QWEN).to_dict()
    assert saved["num_local_experts"] == 16
    assert "num_experts" not in saved
    assert RouterSpec.from_config(saved) == QWEN_SPEC
    assert RouterSpec.from_config({**QWEN, "num_local_experts": 8}).num_experts == 8


def test_null_is_one_group_and_no_factor() -> None:
    config = {**V3, "n_group": None, "topk_group": None, "routed_scaling_factor": None}
    assert RouterSpec.from_config(config) == replace(V3_SPEC, n_group=1, topk_group=1, routed_scaling_factor=1.0)
    assert RouterSpec.from_config({**V3, "num_experts_per_tok": None}).top_k == 8  # as if it were absent


def test_without_renormalization_there_is_no_epsilon() -> None:
    spec = RouterSpec.from_config({**V3, "norm_topk_prob": False})
    assert spec == replace(V3_SPEC, renormalize=False, renormalize_eps=0.0)


def test_greedy_choice_knows_no_groups() -> None:
    v2 = {**V3, "model_type": "deepseek_v2"}
    assert RouterSpec.from_config({**v2, "topk_method": "group_limited_greedy"}).n_group == 4
    for config in (v2, {**v2, "topk_method": "greedy"}):  # "greedy" is the config class's default
        assert (RouterSpec.from_config(config).n_group, RouterSpec.from_config(config).topk_group) == (1, 1)
    with pytest.raises(ValueError, match=r"'topk'; allowed for n_group: .*group_limited_greedy, noaux_tc"):
        RouterSpec.from_config({**v2, "topk_method": "topk"})


@pytest.mark.parametrize(("softcapping", "expected"), [(0.0, None), (0, None), (None, None), (30.0, 30.0)])
def test_soft_cap(softcapping: float | None, expected: float | None) -> None:
    config = {"model_type": "laguna", "num_experts": 16, "moe_router_logit_softcapping": softcapping}
    assert RouterSpec.from_config(config).logit_softcapping == expected


def test_the_nearest_dtype_counts() -> None:
    mixtral = {"model_type": "mixtral", "num_local_experts": 8}
    for config, logits_dtype in (
        (mixtral, "float32"),
        ({**mixtral, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "text_config": mixtral}, "bfloat16"),
        ({"dtype": "bfloat16", "text_config": {**mixtral, "torch_dtype": "float32"}}, "float32"),
        ({"dtype": "bfloat16", "text_config": {**mixtral, "dtype": None}}, "bfloat16"),
        ({"thinker_config": {"dtype": "bfloat16", "text_config": mixtral}}, "bfloat16"),
        ({**mixtral, "dtype": "float16"}, "float32"),
    ):
        assert RouterSpec.from_config(config).logits_dtype == logits_dtype


@pytest.mark.parametrize(
    ("router_dtype", "logits_dtype"), [("fp32", "float32"), ("bf16", "bfloat16"), (None, "float32")]
)
def test_the_dtype_of_a_router(router_dtype: str | None, logits_dtype: str) -> None:
    ring = {**RING, "model_type": "bailing_moe_v2", "dtype": "bfloat16", "router_dtype": router_dtype}
    assert RouterSpec.from_config(ring).logits_dtype == logits_dtype
    if router_dtype is not None:
        lite = {"model_type": "bailing_moe", "hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
        lite |= {"dtype": "bfloat16", "norm_topk_prob": True, "router_dtype": router_dtype}
        assert RouterSpec.from_config(lite).logits_dtype == logits_dtype
    with pytest.raises(ValueError, match="router_dtype = 'fp8'; allowed for logits_dtype: fp32, bf16"):
        RouterSpec.from_config({**ring, "router_dtype": "fp8"})
    with pytest.warns(RuntimeWarning, match="moe_router_dtype = bf16 is not followed"):
        RouterSpec.from_config({**V3, "moe_router_dtype": "bf16"})


def test_gemma_has_experts_only_if_it_says_so() -> None:
    gemma = {"model_type": "gemma4_text", "hidden_size": 64, "num_experts": 8, "top_k_experts": 2}
    assert RouterSpec.from_config({**gemma, "enable_moe_block": True}).num_experts == 8
    for stated in ({}, {"enable_moe_block": None}, {"enable_moe_block": False}, {"enable_moe_block": "true"}):
        with pytest.raises(ValueError, match=r"no experts .*enable_moe_block"):
            RouterSpec.from_config({**gemma, **stated})


@pytest.mark.parametrize("left_out", ["score_function", "moe_router_enable_expert_bias", None])
def test_ring_under_the_name_of_its_ancestor(left_out: str | None) -> None:
    """Some Ling / Ring 2.0 configs state bailing_moe, the type of Ling-lite, which has another router."""
    config = {key: value for key, value in RING.items() if key != left_out}
    expected = replace(V3_SPEC, hidden_size=2048, num_experts=256, top_k=8, n_group=8)
    assert RouterSpec.from_config(config) == replace(expected, topk_group=4)
    assert RouterSpec.from_config({**config, "model_type": "bailing_moe_v2"}) == replace(expected, topk_group=4)


def test_ling_lite_stays_what_it_was() -> None:
    lite = {"model_type": "bailing_moe", "hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
    expected = replace(QWEN_SPEC, renormalize=True)
    for extra in ({}, {"score_function": "softmax"}, {"score_function": None, "moe_router_enable_expert_bias": False}):
        assert RouterSpec.from_config({**lite, "norm_topk_prob": True, **extra}) == expected
