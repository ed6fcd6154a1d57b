"""Configs of types with sigmoid routers, with their specs.

Only the routing keys, of the named model or of the named config class. The published files are in data/configs.
"""

from __future__ import annotations

from typing import Any

from moegate import RouterSpec

Config = dict[str, Any]


def biased(hidden_size: int, num_experts: int, top_k: int, **more: Any) -> RouterSpec:
    """A spec with sigmoid scores and a bias for the choice, renormalised."""
    return RouterSpec(hidden_size, num_experts, top_k, "sigmoid", "score", renormalize=True, **more)


# deepseek-ai/DeepSeek-V3
DEEPSEEK_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}
# MiniMaxAI/MiniMax-M2, under the type of its early files
MINIMAX_M2: Config = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax",
    "hidden_size": 3072,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
}
# arcee-ai/Trinity-Nano-Preview
TRINITY_NANO: Config = {
    "architectures": ["AfmoeForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "model_type": "afmoe",
    "n_group": 1,
    "num_expert_groups": 1,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_limited_groups": 1,
    "num_shared_experts": 1,
    "route_norm": True,
    "route_scale": 2.826,
    "score_func": "sigmoid",
    "topk_group": 1,
}
# tencent/Hy3
HY3: Config = {
    "model_type": "hy_v3",
    "hidden_size": 4096,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "router_scaling_factor": 2.826,
    "route_norm": True,
    "moe_router_enable_expert_bias": True,
}
# moonshotai/Kimi-Linear-48B-A3B-Instruct
KIMI_LINEAR: Config = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_expert_group": 1,
    "topk_group": 1,
    "use_grouped_topk": True,
    "moe_router_activation_func": "sigmoid",
    "moe_renormalize": True,
    "routed_scaling_factor": 2.446,
}
# poolside/Laguna-XS.2
LAGUNA: Config = {
    "model_type": "laguna",
    "hidden_size": 2048,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_routed_scaling_factor": 2.5,
    "moe_router_logit_softcapping": 0.0,
    "norm_topk_prob": True,
}
# vLLM 0.33.0 models/flint/configs.py: FlintConfig
FLINT: Config = {
    "model_type": "flint",
    "hidden_size": 2048,
    "num_experts": 256,
    "num_experts_per_tok": 6,
    "norm_topk_prob": True,
    "router_score_function": "sigmoid",
}
# deepseek-ai/DeepSeek-V4-Flash
DEEPSEEK_V4: Config = {
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.5,
}
# stepfun-ai/Step-3.5-Flash
STEP35: Config = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "hidden_size": 4096,
    "moe_num_experts": 288,
    "moe_top_k": 8,
    "norm_expert_weight": True,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
}
# vLLM 0.33.0 models/inkling/configs.py: InklingModelConfig, with the values that its router asks for
INKLING: Config = {
    "model_type": "inkling_text",
    "hidden_size": 6144,
    "n_routed_experts": 256,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "route_scale": 8.0,
    "use_gate_bias": True,
    "use_global_scale": True,
    "norm_after_topk": True,
    "gate_activation": "sigmoid",
    "shared_expert_sink": True,
}
# rednote-hilab/dots.llm1.inst
DOTS1: Config = {
    "model_type": "dots1",
    "hidden_size": 4096,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "noaux_tc",
}

V3 = biased(7168, 256, 8, n_group=8, topk_group=4, renormalize_eps=1e-20, routed_scaling_factor=2.5)
M2 = biased(3072, 256, 8, weight_dtype="float32")
TRINITY = biased(1024, 128, 8, renormalize_eps=1e-20, routed_scaling_factor=2.826, logits_dtype="bfloat16")
HY = biased(4096, 192, 8, renormalize_eps=1e-20, routed_scaling_factor=2.826)
KIMI = biased(2304, 256, 8, renormalize_eps=1e-20, routed_scaling_factor=2.446)
LAGUNA_SPEC = biased(2048, 256, 8, routed_scaling_factor=2.5)
FLINT_SPEC = RouterSpec(2048, 256, 6, "sigmoid", renormalize=True, weight_dtype="float32")
V4 = RouterSpec(
    4096, 256, 6, "sqrtsoftplus", "score", renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=1.5
)
STEP = biased(4096, 288, 8, routed_scaling_factor=3.0, weight_dtype="float32")
INKLING_SPEC = biased(6144, 256, 6, num_shared_gates=2, global_scale=True, routed_scaling_factor=8.0)
DOTS = biased(4096, 128, 6, renormalize_eps=1e-20, routed_scaling_factor=2.5)
