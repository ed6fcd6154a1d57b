"""Configs of a few keys, and the specs of two of them."""

from __future__ import annotations

from typing import Any

from moegate import RouterSpec
from moegate.configs.model_types import model_types

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
V3_SPEC = RouterSpec(
    hidden_size=64,
    num_experts=16,
    top_k=4,
    scoring_func="sigmoid",
    correction_bias="score",
    n_group=4,
    topk_group=2,
    renormalize=True,
    renormalize_eps=1e-20,
    routed_scaling_factor=2.5,
)
QWEN: dict[str, Any] = {"model_type": "qwen3_moe", "hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
QWEN_SPEC = RouterSpec(hidden_size=64, num_experts=16, top_k=4)
HUNYUAN: dict[str, Any] = {"model_type": "hunyuan_v1_moe", "hidden_size": 64, "num_experts": 16}
V4: dict[str, Any] = {"model_type": "deepseek_v4", "n_routed_experts": 256}
RING: dict[str, Any] = {
    "model_type": "bailing_moe",
    "hidden_size": 2048,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
}


def counting_experts(model_type: str, num_experts: int | None) -> dict[str, Any]:
    """The part of a config that states the number of experts."""
    first, *inner = model_types()[model_type].keys["num_experts"][0].split(".")
    return {first: {name: num_experts for name in inner} or num_experts} if inner != ["0"] else {first: [num_experts]}
