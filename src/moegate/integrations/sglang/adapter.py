"""SGLang's `TopKConfig` as a `RouterSpec`, or the reason why SGLang goes on to route.

The numbers are those of SGLang's CUDA kernels. Where its kernels for one config differ by more than rounding, the
config is left to SGLang.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.topk import _SGLANG_EXPERIMENTAL_LORA_OPTI, TopKOutputFormat
from sglang.srt.runtime_context import get_exec

from moegate import RouterSpec
from moegate.integrations.takeover import LeftToEngineError

RENORMALIZE_EPS = 1e-20
"""SGLang's `_RENORMALIZE_SUM_EPSILON`. Its Triton router guards against a sum of 0 instead; a sum that the difference
reaches is below 1e-13."""


def spec_of(config: Any, num_experts: int, hidden_size: int) -> RouterSpec:
    """What a `TopK` with this config computes.

    Args:
        config: A `TopKConfig` of SGLang 0.5.23.
        num_experts: The columns of the logits.
        hidden_size: K, which the selection does not depend on.

    Returns:
        The spec, without the columns of shared experts.

    Raises:
        LeftToEngineError: SGLang routes differently from any spec, or differently from case to case.
    """
    _check_engine(config)
    _check_shared_experts(config)
    scoring_func = _scoring_func(config)
    has_scale = config.apply_routed_scaling_factor_on_output and config.routed_scaling_factor is not None
    try:
        return RouterSpec(
            hidden_size,
            num_experts,
            config.top_k - config.num_shared_topk_slots,
            scoring_func=scoring_func,
            correction_bias=None if config.correction_bias is None else "score",
            n_group=config.num_expert_group if config.use_grouped_topk else 1,
            topk_group=config.topk_group if config.use_grouped_topk else 1,
            group_score="max" if config.correction_bias is None else "top2_sum",
            renormalize=config.renormalize,
            # A softmax is at least 1 / num_experts at its largest, beside which the eps rounds away.
            renormalize_eps=RENORMALIZE_EPS if config.renormalize and scoring_func != "softmax" else 0.0,
            routed_scaling_factor=float(config.routed_scaling_factor) if has_scale else 1.0,
        )
    except (TypeError, ValueError) as error:
        raise LeftToEngineError(str(error)) from error


def _check_engine(config: Any) -> None:
    """Raises for what SGLang does beside a selection, and for modes that moegate does not have."""
    if config.custom_routing_function is not None:
        raise LeftToEngineError("a routing function of the model's own")
    if config.output_format is not TopKOutputFormat.STANDARD:
        raise LeftToEngineError(f"output format {config.output_format.name}")
    if config.fused_gate_packed_ids:
        raise LeftToEngineError("packed ids")
    if _SGLANG_EXPERIMENTAL_LORA_OPTI:
        raise LeftToEngineError("SGLANG_EXPERIMENTAL_LORA_OPTI")
    if get_exec().deterministic.enable_deterministic_inference:
        raise LeftToEngineError("deterministic inference")
    if get_exec().comm.enable_symm_mem:
        raise LeftToEngineError("symmetric memory")
    if torch.version.hip is not None:
        raise LeftToEngineError("ROCm")
    bias = config.correction_bias
    if bias is not None and bias.dtype != torch.float32:
        # moegate would keep a float32 copy, which a reload of the weights would not reach.
        raise LeftToEngineError(f"correction bias in {str(bias.dtype).removeprefix('torch.')}")


def _check_shared_experts(config: Any) -> None:
    """Raises unless the columns of shared experts are the same in all of SGLang's kernels."""
    slots = config.num_shared_topk_slots
    if slots and config.correction_bias is None:
        raise LeftToEngineError("shared experts in the top-k without a correction bias")
    if slots and config.scoring_func == "sqrtsoftplus" and not config.use_grouped_topk:
        raise LeftToEngineError("a shared expert in the top-k with sqrtsoftplus")  # whose padding is masked, too
    if slots > 1:
        raise LeftToEngineError(f"{slots} shared experts in the top-k")


def _scoring_func(config: Any) -> Any:
    if config.use_grouped_topk:
        if config.correction_bias is not None:
            return "sigmoid"  # `biased_grouped_topk` reads no scoring_func
        if config.scoring_func not in ("softmax", "sigmoid"):
            raise LeftToEngineError(f"scoring_func {config.scoring_func!r} with groups")
        return config.scoring_func
    if config.scoring_func == "softmax":
        if config.correction_bias is not None:
            raise LeftToEngineError("softmax with a correction bias, which not all of SGLang's kernels add")
        if config.runner_backend is not None and config.runner_backend.is_flashinfer_trtllm_routed():
            raise LeftToEngineError("raw logits as weights, for flashinfer_trtllm_routed")
    return config.scoring_func
