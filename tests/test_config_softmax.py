"""Configs of softmax types: each stated key is followed, refused or warned of; every case is written out."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

from moegate import RouterSpec
from moegate.configs.model_types import refused
from moegate.warn import warn_once

SIZE: dict[str, Any] = {"hidden_size": 64, "num_experts_per_tok": 4}
V2: dict[str, Any] = {"model_type": "deepseek_v2", "n_routed_experts": 16, **SIZE}
PLAIN = RouterSpec(64, 16, 4)
NORMED = replace(PLAIN, renormalize=True)
TOPK = RouterSpec(64, 16, 4, "identity", weights_from="softmax_of_selected")
HUNYUAN = RouterSpec(64, 16, 4, renormalize=True, weight_dtype="float32")
ERNIE = RouterSpec(64, 16, 4, "softmax", "score", renormalize=True, renormalize_floor=1e-12, weight_dtype="float32")
LONGCAT = replace(PLAIN, correction_bias="score", weight_dtype="float32", num_zero_experts=8, routed_scaling_factor=6.0)

# DeepSeek-VL2: https://huggingface.co/deepseek-ai/deepseek-vl2 config.json, language_config.
VL2 = {
    "model_type": "deepseek_v2",
    "hidden_size": 2560,
    "n_group": 1,
    "n_routed_experts": 72,
    "norm_topk_prob": True,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.0,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
}
VL2_SPEC = RouterSpec(
    2560, 72, 6, "sigmoid", "score", renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=2.0
)


def of(model_type: str, **stated: object) -> dict[str, Any]:
    return {"model_type": model_type, "num_experts": 16, **SIZE, **stated}


FOLLOWED: dict[str, tuple[dict[str, Any], RouterSpec]] = {
    "v2, sigmoid": ({**V2, "scoring_func": "sigmoid"}, replace(PLAIN, scoring_func="sigmoid", group_score="max")),
    "v2, normed": (
        {**V2, "norm_topk_prob": True, "routed_scaling_factor": 2.0},
        replace(NORMED, group_score="max", renormalize_eps=1e-20, routed_scaling_factor=2.0),
    ),
    "v2, bias and softmax": (
        {**V2, "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2},
        replace(PLAIN, correction_bias="score", n_group=4, topk_group=2),
    ),
    "v2, as DeepSeek's own class writes": ({**V2, "topk_method": "gready"}, replace(PLAIN, group_score="max")),
    "VL2": (VL2, VL2_SPEC),
    "VL2, four groups": ({**VL2, "n_group": 4, "topk_group": 2}, replace(VL2_SPEC, n_group=4, topk_group=2)),
    "unlimited": (
        of("unlimited_language", n_routed_experts=16, scoring_func="softmax", norm_topk_prob=False),
        replace(PLAIN, group_score="max"),
    ),
    # https://huggingface.co/deepseek-ai/deepseek-moe-16b-base config.json, the routing part
    "deepseek-moe-16b": (
        {
            "model_type": "deepseek",
            "hidden_size": 2048,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "num_experts_per_tok": 6,
            "scoring_func": "softmax",
            "torch_dtype": "bfloat16",
        },
        RouterSpec(2048, 64, 6, group_score="max", logits_dtype="bfloat16"),
    ),
    "deepseek, normed": (
        of("deepseek", n_routed_experts=16, norm_topk_prob=True),
        replace(NORMED, group_score="max", renormalize_eps=1e-20),
    ),
    "qwen3-vl, not normed": (of("qwen3_vl_moe_text", norm_topk_prob=False), PLAIN),
    "qwen3.5, not normed": (of("qwen3_5_moe_text", norm_topk_prob=False), PLAIN),
    "mobius": (of("interns2_mobius_text"), replace(NORMED, logits_dtype="bfloat16")),
    "sdar": (of("sdar_moe", norm_topk_prob=True), NORMED),
    "grove": (of("grove_moe", norm_topk_prob=True), NORMED),
    "llada": (of("llada", moe_router_score_function="softmax", moe_router_enable_expert_bias=False), PLAIN),
    "lladamoe": (of("lladamoe", routed_scaling_factor=1, norm_topk_prob=None), PLAIN),
    "ling-lite, scaled": (
        of("bailing_moe", norm_topk_prob=True, routed_scaling_factor=2.5),
        replace(NORMED, routed_scaling_factor=2.5),
    ),
    "ling-lite, groups": (
        of("bailing_moe", norm_topk_prob=True, n_group=4, topk_group=2),
        replace(NORMED, n_group=4, topk_group=2, group_score="max"),
    ),
    "grok-2": (
        {
            "architectures": ["Grok1ForCausalLM"],
            "model_type": "git",
            "hidden_size": 8192,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_logit_softcapping": 30.0,
            "residual_moe": True,
        },
        RouterSpec(8192, 8, 2, logit_softcapping=30.0, weight_dtype="float32"),
    ),
    "grok-1, normed": (of("grok-1", moe_renormalize=True), replace(NORMED, weight_dtype="float32")),
    "hunyuan, as published": (
        of("hunyuan_v1_moe", moe_topk=[4, 4], n_group=False, topk_group=False, routed_scaling_factor=False)
        | {"group_limited_greedy": False, "norm_topk_prob": True},
        HUNYUAN,
    ),
    "hunyuan, groups": (
        of("hunyuan_v1_moe", moe_topk=4, group_limited_greedy=True, n_group=4, topk_group=2),
        replace(HUNYUAN, n_group=4, topk_group=2, group_score="max"),
    ),
    # https://huggingface.co/tencent/Tencent-Hunyuan-Large Hunyuan-A52B-Instruct/config.json
    "hunyuan-large": (
        {"model_type": "hunyuan", "hidden_size": 6400, "moe_topk": 1, "num_experts": 16, "torch_dtype": "bfloat16"},
        RouterSpec(6400, 16, 1, weight_dtype="float32"),
    ),
    "hunyuan, four": (of("hunyuan", moe_topk=4), HUNYUAN),
    "hunyuan image": (of("hunyuan_image_3_moe", moe_topk=[4, 4]), replace(HUNYUAN, renormalize_floor=1e-8)),
    "hunyuan image, other name": (of("Hunyuan", moe_topk=4), replace(HUNYUAN, renormalize_floor=1e-8)),
    "ernie, no bias": (
        of("ernie4_5_moe", moe_num_experts=16, moe_k=4, moe_use_aux_free=False),
        replace(ERNIE, correction_bias=None),
    ),
    "ernie, sigmoid": (
        of("ernie4_5_moe", moe_num_experts=16, moe_k=4, moe_gate_act="sigmoid"),
        replace(ERNIE, scoring_func="sigmoid"),
    ),
    "longcat, normed": (
        of("longcat_flash", n_routed_experts=16, moe_topk=4, zero_expert_num=8, norm_topk_prob=True),
        replace(LONGCAT, renormalize=True, renormalize_eps=1e-20),
    ),
    "longcat, linear bias": (
        of("longcat_flash_ngram", n_routed_experts=16, moe_topk=4, zero_expert_num=8, router_bias=True),
        replace(LONGCAT, linear_bias=True),
    ),
    "longcat, sparse": (
        of("longcat_flash_sparse", n_routed_experts=16, moe_topk=4),
        replace(LONGCAT, num_zero_experts=0),
    ),
    # LongCat's configs state no type.
    "longcat, by its class": (
        {"architectures": ["LongcatCausalLM"], "hidden_size": 64, "n_routed_experts": 16, "moe_topk": 4}
        | {"zero_expert_num": 8, "zero_expert_type": "identity", "routed_scaling_factor": 6.0},
        LONGCAT,
    ),
    "longcat, no zero experts": (
        of("longcat_flash", n_routed_experts=16, moe_topk=4, zero_expert_num=None),
        replace(LONGCAT, num_zero_experts=0),
    ),
    "xllm": (
        of("xllm", norm_topk_prob=True, moe_gate_bias=True, router_scaling_factor=2.5, torch_dtype="bfloat16"),
        RouterSpec(
            *(64, 16, 4, "sigmoid", "score"),
            renormalize=True,
            routed_scaling_factor=2.5,
            logits_dtype="bfloat16",
        ),
    ),
    "xllm, softmax": (of("xllm", norm_topk_prob=False, router_score_func="softmax"), PLAIN),
    "minicpm": (of("minicpm"), NORMED),
    "nomic": (
        {"model_type": "nomic_bert", "n_embd": 64, "num_experts": 16, "moe_top_k": 4, "moe_every_n_layers": 2}
        | {"moe_normalize_expert_weights": False, "expert_choice_router": False},
        PLAIN,
    ),
    "xverse": (of("xverse_moe", moe_top_k=4, norm_topk_prob=True), NORMED),
    "moondream": (
        {"model_type": "moondream3_text", "dim": 64, "moe": {"n_experts": 16, "n_experts_per_tok": 4}},
        replace(TOPK, linear_bias=True),
    ),
    "phixtral": (
        {"model_type": "phi-msft", "n_embd": 64, "num_local_experts": 16, "num_experts_per_tok": 4},
        TOPK,
    ),
    "gpt-oss, its first names": (
        {"model_type": "gpt_oss", "hidden_size": 64, "num_experts": 16, "experts_per_token": 2, "dtype": "float32"},
        replace(TOPK, top_k=2, linear_bias=True),
    ),
    "jetmoe, its first names": (
        {"model_type": "jetmoe", "hidden_size": 64, "moe_num_experts": 16, "moe_top_k": 4},
        TOPK,
    ),
    "granite, normed anyway": (of("granitemoe", num_local_experts=16, norm_topk_prob=True), TOPK),
    "command-a, not normed": (of("cohere2_moe", norm_topk_prob=False), PLAIN),
    "command-a, sigmoid, not normed": (
        of("cohere2_moe", norm_topk_prob=False, expert_selection_fn="sigmoid"),
        RouterSpec(64, 16, 4, "identity", weights_from="sigmoid_of_selected"),
    ),
    "command-a, normed": (of("cohere2_moe", norm_topk_prob=True), TOPK),
    "pangu, second": (
        of("PanguProMoE", n_routed_experts=16, router_enable_expert_bias=True, routed_scaling_factor=2.5)
        | {"architectures": ["PanguProMoEV2ForCausalLM"], "norm_topk_prob": True},
        replace(NORMED, scoring_func="sigmoid", correction_bias="score", routed_scaling_factor=2.5),
    ),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_what_is_stated_is_followed(case: str) -> None:
    """Followed, without a warning."""
    config, expected = FOLLOWED[case]
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RouterSpec.from_config(config) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**V2, "scoring_func": "sqrtsoftplus"}, "scoring_func = 'sqrtsoftplus'; allowed for scoring_func: softmax"),
        (of("lladamoe", moe_router_score_function="sigmoid"), "allowed for scoring_func: softmax, null"),
        (of("lladamoe", moe_router_enable_expert_bias=True), "allowed for correction_bias: false, null"),
        (of("hunyuan_v1_moe", norm_topk_prob=False), "norm_topk_prob = False; allowed for renormalize: true, null"),
        (of("nomic_bert", moe_top_k=2, moe_normalize_expert_weights=1.0), "allowed for renormalize: false, null"),
        (of("nomic_bert", moe_top_k=2, expert_choice_router=True), "expert_choice_router = True; allowed"),
        (of("ernie4_5_moe", moe_gate_act="relu"), "moe_gate_act = 'relu'; allowed for scoring_func: softmax, sigmoid"),
        (of("xllm", router_score_func="relu"), "router_score_func = 'relu'; allowed for scoring_func"),
        (of("PanguProMoE", num_experts_per_tok=4), "num_experts_per_tok = 4; allowed for top_k: 8"),
    ],
)
def test_what_no_reader_understands_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec.from_config(config)


@pytest.mark.parametrize(
    "config",
    [
        of("mixtral", norm_topk_prob=False),
        of("lladamoe", norm_topk_prob=True),
        of("minicpm", scoring_func="sigmoid"),
        of("jamba", routed_scaling_factor=2.5),
        of("granitemoe", num_local_experts=16, use_expert_bias=True),
        of("gpt_oss", num_local_experts=16, norm_topk_prob=False),
        of("qwen3_next", n_group=4),
        of("qwen3_moe", scoring_func="sigmoid"),
        of("llama4_text", num_local_experts=16, routed_scaling_factor=2.0),
        of("olmoe", n_group=4),
    ],
    ids=lambda config: config["model_type"],
)
def test_what_is_not_followed_is_warned_of(config: dict[str, Any]) -> None:
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=rf"{config['model_type']}'.* is not followed; the router has"):
        RouterSpec.from_config(config)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        # granite-4.0-1b, gemma-4-31B-it and Jamba-Reasoning-3B: dense models of types with experts
        ({"model_type": "granitemoehybrid", "hidden_size": 2048, "num_local_experts": 0}, "num_local_experts = 0"),
        ({"model_type": "gemma4_text", "enable_moe_block": False, "num_experts": None}, "enable_moe_block = false"),
        ({"model_type": "gemma4", "text_config": {"enable_moe_block": False}}, "enable_moe_block = false"),
        (of("jamba", num_experts=1), "num_experts = 1"),
        (of("hunyuan", num_experts=1), "num_experts = 1"),
        (of("qwen3_moe", num_experts=0), "num_experts = 0"),
        (of("minicpm", num_experts=0), "num_experts = 0"),
        ({"model_type": "minicpm", "hidden_size": 2304}, "no num_experts"),
        ({"model_type": "llada", "d_model": 4096}, "no num_experts"),
        (of("nomic_bert", moe_every_n_layers=0), "moe_every_n_layers = 0"),
    ],
)
def test_dense_members_of_types_with_experts(config: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match="this model has no experts") as caught:
        RouterSpec.from_config(config)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("model_type", refused())
def test_types_that_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(ValueError, match=f"model_type '{model_type}' is refused: ") as caught:
        RouterSpec.from_config(of(model_type))
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("architecture", ["PhiMoEForCausalLM", "GRINMoEForCausalLM", "ZayaForCausalLM"])
def test_classes_that_are_refused_by_name(architecture: str) -> None:
    with pytest.raises(ValueError, match=r"is refused: .*out of scope"):
        RouterSpec.from_config({"architectures": [architecture], "num_experts": 16, **SIZE})
