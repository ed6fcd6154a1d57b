"""By model type: a config, as its readers define the routing keys, and the config's spec."""

from __future__ import annotations

from dataclasses import replace

from sigmoid_configs import DEEPSEEK_V3, V3, Config

from moegate import RouterSpec

DEEPSEEK: Config = {
    key: value for key, value in DEEPSEEK_V3.items() if key not in ("architectures", "model_type", "torch_dtype")
}
DEEPSEEK_SPEC = V3
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

# By model type: the other keys of a config, and the spec.
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

# By composite type: the key of the inner config, which states no type, and the inner config's entry of TYPES.
WRAPPED = {
    "bailing_moe_v3_vl": ("text_config", "bailing_moe_v2_5"),
    "bailingmm_moe_v2_lite": ("llm_config", "bailing_moe_v2_5"),
    "deepseek_v41": ("text_config", "deepseek_v41_text"),
    "hy_v4_vl": ("text_config", "hy_v4_vl_text"),
    "inkling2_loop": ("text_config", "inkling2_loop_text"),
    "inkling_mm_model": ("text_config", "inkling_model"),
    "interns2_mobius": ("text_config", "interns2_mobius_text"),
    "kimi_k25": ("text_config", "joyai_llm_flash"),
    "kimi_vl": ("text_config", "joyai_llm_flash"),
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
