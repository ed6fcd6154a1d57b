"""Types with sigmoid routers (and near relatives) that vLLM, SGLang, mlx-lm or Transformers 5.24 know."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

from moegate import RouterSpec
from moegate.catalog.model_types import routing_keys
from moegate.warn import warn_once

Config = dict[str, Any]

DEEPSEEK: Config = {
    "hidden_size": 7168,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}
DEEPSEEK_SPEC = RouterSpec(
    7168,
    256,
    8,
    "sigmoid",
    "score",
    n_group=8,
    topk_group=4,
    renormalize=True,
    renormalize_eps=1e-20,
    routed_scaling_factor=2.5,
)
V41: Config = {
    "hidden_size": 5120,
    "n_routed_experts": 384,
    "num_experts_per_tok": 6,
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.5,
}
V41_SPEC = RouterSpec(
    5120, 384, 6, "sqrtsoftplus", "score", renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=1.5
)
# The fields of https://github.com/inclusionAI/Ring-V2.5 models/configuration_bailing_moe_v2_5.py
RING: Config = {
    "hidden_size": 2048,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "moe_router_enable_expert_bias": True,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "router_dtype": "fp32",
}
RING_SPEC = replace(DEEPSEEK_SPEC, hidden_size=2048)
STEP5: Config = {
    "hidden_size": 5120,
    "moe_num_experts": 16,
    "moe_top_k": 4,
    "norm_expert_weight": True,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 2.0,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
}
STEP5_SPEC = RouterSpec(
    5120, 16, 4, "sigmoid", "score", renormalize=True, routed_scaling_factor=2.0, weight_dtype="float32"
)
K2_HORIZON: Config = {
    "architectures": ["K2HorizonForCausalLM"],
    "hidden_size": 2560,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "norm_topk_prob": True,
    "router_score_func": "sigmoid",
    "router_scaling_factor": 2.5,
    "moe_gate_bias": True,
    "mova_num_experts": 3,
    "dtype": "bfloat16",
}
K2_SPEC = RouterSpec(
    2560, 128, 8, "sigmoid", "score", renormalize=True, routed_scaling_factor=2.5, logits_dtype="bfloat16"
)
PANGU: Config = {
    "hidden_size": 7680,
    "num_routed_experts": 256,
    "num_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
PANGU_SPEC = RouterSpec(7680, 256, 8, "sigmoid", renormalize=True, routed_scaling_factor=2.5)
MUSE: Config = {
    "hidden_size": 5120,
    "moe": {
        "num_experts": 64,
        "topk": 4,
        "route_scale": 2.0,
        "router_score_normalization": "sigmoid",
        "router_score_division_eps": 1e-15,
    },
    "metap": {"use_metap": False},
}
MUSE_SPEC = RouterSpec(
    5120,
    64,
    4,
    "sigmoid",
    "score",
    renormalize=True,
    renormalize_eps=1e-15,
    routed_scaling_factor=2.0,
    weight_dtype="float32",
)
MINIMAX_M3: Config = {
    "hidden_size": 6144,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "routed_scaling_factor": 2.0,
}
INKLING2: Config = {
    "hidden_size": 2304,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "route_scale": 8.0,
    "scoring_func": "sigmoid",
}
HY_V4_VL: Config = {
    "hidden_size": 6144,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
}
INKLING: Config = {
    "hidden_size": 6144,
    "n_routed_experts": 256,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "route_scale": 8.0,
}
ALICE: Config = {
    "hidden_size": 4096,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "router_score_function": "sigmoid",
    "router_bias_correction": True,
}
SOFTMAX: Config = {"hidden_size": 1024, "num_experts": 128, "num_experts_per_tok": 4, "norm_topk_prob": True}

# By model type: what a config of the type says beside it, and the spec.
TYPES: dict[str, tuple[Config, RouterSpec]] = {
    "joyai_llm_flash": (DEEPSEEK, DEEPSEEK_SPEC),
    "dots_vlm": (DEEPSEEK, DEEPSEEK_SPEC),
    "gigachat3_5": (
        {**DEEPSEEK, "hidden_size": 1280, "n_routed_experts": 64, "n_group": 1, "topk_group": 1},
        replace(DEEPSEEK_SPEC, hidden_size=1280, num_experts=64, n_group=1, topk_group=1),
    ),
    "dots3_note": (
        {
            key: value
            for key, value in {**DEEPSEEK, "hidden_size": 5120}.items()
            if key not in ("n_group", "topk_group")
        },
        replace(DEEPSEEK_SPEC, hidden_size=5120, n_group=1, topk_group=1),
    ),
    "deepseek_v41": (V41, V41_SPEC),
    "deepseek_v41_text": (V41, V41_SPEC),
    "bailing_moe_v2_5": (RING, RING_SPEC),
    "bailing_moe_linear": (RING, RING_SPEC),
    "llada2_moe": ({**RING, "norm_topk_prob": True, "expert_capacity": None}, RING_SPEC),
    "param2moe": (
        {key: value for key, value in RING.items() if key not in ("n_group", "topk_group")},
        replace(RING_SPEC, n_group=1, topk_group=1),
    ),
    "step5": (STEP5, STEP5_SPEC),
    "k2_horizon": (K2_HORIZON, K2_SPEC),
    "xllm": ({**K2_HORIZON, "moe_gate_bias": False}, replace(K2_SPEC, correction_bias=None)),
    "pangu_ultra_moe": (PANGU, PANGU_SPEC),
    "PanguUltraMoE": ({**PANGU, "router_enable_expert_bias": True}, replace(PANGU_SPEC, correction_bias="score")),
    "musespark1x_text": (MUSE, MUSE_SPEC),
    "minimax_m3_text": (
        MINIMAX_M3,
        RouterSpec(
            6144, 128, 4, "sigmoid", "score", renormalize=True, routed_scaling_factor=2.0, weight_dtype="float32"
        ),
    ),
    "inkling2_loop_text": (
        INKLING2,
        RouterSpec(
            2304,
            128,
            8,
            "sigmoid",
            "score",
            renormalize=True,
            renormalize_eps=1e-20,
            routed_scaling_factor=8.0,
            weight_dtype="float32",
        ),
    ),
    "hy_v4_vl_text": (
        HY_V4_VL,
        replace(DEEPSEEK_SPEC, hidden_size=6144, n_group=1, topk_group=1, routed_scaling_factor=2.827),
    ),
    "inkling_model": (
        INKLING,
        RouterSpec(
            6144,
            256,
            6,
            "sigmoid",
            "score",
            renormalize=True,
            routed_scaling_factor=8.0,
            num_shared_gates=2,
            global_scale=True,
        ),
    ),
    "alice_ai": (ALICE, RouterSpec(4096, 256, 8, "sigmoid", "score", renormalize=True)),
    "lara_mini": ({**SOFTMAX, "dtype": "bfloat16"}, RouterSpec(1024, 128, 4, "softmax", renormalize=True)),
    "iquest_q1": (
        {**SOFTMAX, "dtype": "bfloat16"},
        RouterSpec(1024, 128, 4, "softmax", renormalize=True, weight_dtype="float32"),
    ),
    "interns2_mobius_text": (
        SOFTMAX,
        RouterSpec(1024, 128, 4, "softmax", renormalize=True, logits_dtype="bfloat16"),
    ),
}

# By composite type: the key and the type of the config inside it, which states none.
WRAPPED = {
    "deepseek_v41": ("text_config", "deepseek_v41_text"),
    "hy_v4_vl": ("text_config", "hy_v4_vl_text"),
    "inkling2_loop": ("text_config", "inkling2_loop_text"),
    "inkling_mm_model": ("text_config", "inkling_model"),
    "interns2_mobius": ("text_config", "interns2_mobius_text"),
    "kimi_k25": ("text_config", "joyai_llm_flash"),
    "minimax_m3_vl": ("text_config", "minimax_m3_text"),
    "step5_vl": ("text_config", "step5"),
}

PUZZLE: Config = {
    "model_type": "nemotron_h_puzzle",
    "hidden_size": 4096,
    "n_routed_experts": 512,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 5.0,
    "layers_block_type": ["mamba", "moe", "attention", "moe"],
    "block_configs": [
        {"block_type": "mamba"},
        {"block_type": "moe", "moe_intermediate_size": 1280, "num_experts_per_tok": 4},
        {"block_type": "attention"},
        {"block_type": "moe", "moe_intermediate_size": 2688, "num_experts_per_tok": 22},
    ],
}
PUZZLE_SPEC = replace(
    DEEPSEEK_SPEC, hidden_size=4096, num_experts=512, n_group=1, topk_group=1, routed_scaling_factor=5.0
)


def silent_spec(config: Config, layer: int | None = None) -> RouterSpec:
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return RouterSpec.from_config(config, layer=layer)


@pytest.mark.parametrize("model_type", TYPES)
def test_type(model_type: str) -> None:
    config, expected = TYPES[model_type]
    assert silent_spec({**config, "model_type": model_type}) == expected


@pytest.mark.parametrize("model_type", TYPES)
def test_the_number_of_experts_is_not_invented(model_type: str) -> None:
    counting = [key.split(".")[0] for key in routing_keys().states["num_experts"]]
    config = {key: value for key, value in TYPES[model_type][0].items() if key not in counting}
    with pytest.raises(ValueError, match="no experts"):
        RouterSpec.from_config({**config, "model_type": model_type})


@pytest.mark.parametrize("model_type", WRAPPED)
def test_wrapper(model_type: str) -> None:
    key, inner = WRAPPED[model_type]
    config, expected = TYPES[inner]
    assert silent_spec({"model_type": model_type, key: config}) == expected


def test_deepseek_v41_has_no_hash_layers() -> None:
    config = {**V41, "model_type": "deepseek_v41", "num_hash_layers": 3}
    assert RouterSpec.from_config(config, layer=0) == V41_SPEC


def test_layers_of_a_puzzle_differ() -> None:
    assert silent_spec(PUZZLE, layer=1) == replace(PUZZLE_SPEC, top_k=4)
    assert silent_spec(PUZZLE, layer=3) == replace(PUZZLE_SPEC, top_k=22)
    with pytest.raises(ValueError, match=r"num_experts_per_tok differs between layers \(\[4, 22\]\); name the layer"):
        RouterSpec.from_config(PUZZLE)
    with pytest.raises(ValueError, match=r"layer = 4; allowed: 0 to 3, for block_configs lists 4 layers"):
        RouterSpec.from_config(PUZZLE, layer=4)
    same = [{**block, "num_experts_per_tok": 6, "n_routed_experts": 256} for block in PUZZLE["block_configs"]]
    assert silent_spec({**PUZZLE, "block_configs": same}) == replace(PUZZLE_SPEC, top_k=6, num_experts=256)


def test_a_puzzle_without_blocks_has_no_top_k() -> None:
    """Where the class of Nemotron-H has one."""
    config = {key: value for key, value in PUZZLE.items() if key != "block_configs"}
    with pytest.raises(ValueError, match="no num_experts_per_tok, and no default for top_k"):
        RouterSpec.from_config(config)


@pytest.mark.parametrize(
    ("model_type", "stated", "message"),
    [
        ("llada2_moe", {"expert_capacity": 64}, "expert_capacity = 64; allowed for top_k: null"),
        ("deepseek_v41", {"gate_temp": 2.0}, "gate_temp = 2.0; allowed for logit_multiplier"),
        ("musespark1x_text", {"metap": {"use_metap": True}}, "metap.use_metap = True; allowed for logit_multiplier"),
        ("musespark1x_text", {"moe": {**MUSE["moe"], "is_enabled": False}}, r"no experts \(moe.is_enabled = false\)"),
        ("alice_ai", {"router_bias_correction": False}, "router_bias_correction = False; allowed"),
        ("alice_ai", {"router_score_function": "softmax"}, "router_score_function = 'softmax'; allowed"),
        ("k2_horizon", {"router_score_func": "relu"}, "router_score_func = 'relu'; allowed"),
        ("gigachat3_5", {"scoring_func": "softmax"}, "scoring_func = 'softmax'; allowed"),
    ],
)
def test_what_no_reader_understands_is_refused(model_type: str, stated: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec.from_config({**TYPES[model_type][0], **stated, "model_type": model_type})


@pytest.mark.parametrize(
    ("model_type", "stated", "change"),
    [
        ("bailing_moe_v2", {"norm_topk_prob": False}, {"renormalize": False, "renormalize_eps": 0.0}),
        ("bailing_moe_v2_5", {"norm_topk_prob": False}, {"renormalize": False, "renormalize_eps": 0.0}),
        ("bailing_moe_v2_5", {"moe_router_enable_expert_bias": False}, {"correction_bias": None}),
        ("bailing_hybrid", {"score_function": "softmax"}, {"scoring_func": "softmax"}),
        ("bailing_hybrid", {"moe_router_enable_expert_bias": False}, {"correction_bias": None}),
        ("sarvam_moe", {"norm_topk_prob": False}, {"renormalize": False, "renormalize_eps": 0.0}),
    ],
)
def test_keys_of_ling_and_its_relatives(model_type: str, stated: Config, change: Config) -> None:
    plain = {key: value for key, value in RING.items() if key not in ("scoring_func", "topk_method")}
    assert silent_spec({**plain, **stated, "model_type": model_type}) == replace(RING_SPEC, **change)


def test_scores_of_dots3_notes_vision_tower() -> None:
    """vLLM 0.33.0 models/dots3_note/nvidia/vision.py: MoESwiGLUFFN."""
    config: Config = {
        "model_type": "dots3_note_vision_encoder",
        "embed_dim": 1536,
        "pyramid_num_routed": [64, 64],
        "capacity_factor": 2,
        "router_scale": 1.5,
    }
    expected = replace(
        DEEPSEEK_SPEC,
        hidden_size=1536,
        num_experts=64,
        top_k=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.5,
    )
    assert silent_spec({**config, "router_scoring_func": "sigmoid"}) == expected
    plain = replace(expected, scoring_func="softmax", renormalize=False, renormalize_eps=0.0)
    assert silent_spec({**config, "router_scoring_func": "softmax"}) == plain


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("BailingMoeV2_5ForCausalLM", "bailing_moe_v2_5"),
        ("LLaDA2MoeModelLM", "llada2_moe"),
        ("PanguProMoEV2ForCausalLM", "pangu_ultra_moe"),
        ("PanguUltraMoEForCausalLM", "pangu_ultra_moe"),
        ("Step5ForCausalLM", "step5"),
    ],
)
def test_a_class_names_its_type(architecture: str, model_type: str) -> None:
    config, expected = TYPES[model_type]
    assert silent_spec({**config, "architectures": [architecture]}) == expected
