"""The peers: FlashInfer where it takes the shape, cuBLAS with the best selection, PyTorch eager and compiled."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moegate.measure.record import version
from moegate.measure.timing import reason_of
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec

# (K, N) that FlashInfer's router GEMM takes, with float32 logits; M is 1 to 16.
_GEMMS = {
    (7168, 256): "mm_M1_16_K7168_N256",
    (6144, 256): "mm_M1_16_K6144_N256",
    (7168, 384): "mm_M1_16_K7168_N384",
    (7168, 896): "mm_M1_16_K7168_N896",
}
FLASHINFER_MAX_TOKENS = 16


@functools.cache
def _flashinfer() -> tuple[Any, Any, str]:
    """The module of the GEMM, of the top-k, and the version or the reason why there are none."""
    try:
        gemm = importlib.import_module("flashinfer.gemm.routergemm")
        top_k = importlib.import_module("flashinfer.fused_moe.fused_routing_dsv3")
    except Exception as error:  # an import of a large package fails in many ways
        return None, None, f"absent: {reason_of(error)}"
    return gemm, top_k, version("flashinfer-python")


def flashinfer_version() -> str:
    """FlashInfer's version, or why it is absent."""
    return _flashinfer()[2]


def flashinfer_gemm(hidden_size: int, num_rows: int, tokens: int) -> Callable[[Tensor, Tensor], Tensor] | str:
    """(hidden, weight) -> float32 logits, or the reason why there is none."""
    module, _, found = _flashinfer()
    name = _GEMMS.get((hidden_size, num_rows))
    if module is None:
        return found
    if name is None or tokens > FLASHINFER_MAX_TOKENS:
        return f"not supported: K={hidden_size} N={num_rows} M={tokens}"
    function = getattr(module, name)

    def gemm(hidden: Tensor, weight: Tensor) -> Tensor:
        out = torch.empty(hidden.shape[0], num_rows, dtype=torch.float32, device=hidden.device)
        function(hidden, weight.t(), out, launch_with_pdl=True)
        return out

    return gemm


def flashinfer_top_k(spec: RouterSpec, tensors: RouterTensors) -> Callable[[Tensor], tuple[Tensor, Tensor]] | str:
    """Float32 logits -> ids and weights, or the reason why it cannot."""
    _, module, found = _flashinfer()
    if module is None:
        return found
    if not takes_top_k(spec):
        return "not supported: another router than sigmoid + bias, or too large"
    bias, groups, kept, k = tensors.e_score_correction_bias, spec.n_group, spec.topk_group, spec.top_k

    def top_k(logits: Tensor) -> tuple[Tensor, Tensor]:
        values = torch.empty(logits.shape[0], k, dtype=torch.float32, device=logits.device)
        ids = torch.empty(logits.shape[0], k, dtype=torch.int32, device=logits.device)
        # Its check refuses every k > 1 without groups (topk_group * n_group >= topk), which its kernel takes.
        scale = spec.routed_scaling_factor
        module.fused_topk_deepseek(
            logits, bias, groups, kept, k, scale, values, ids, launch_with_pdl=True, skip_check=True
        )
        return ids, values

    return top_k


def takes_top_k(spec: RouterSpec) -> bool:
    """True if `fused_topk_deepseek` computes this router, less the contract's promise about ties."""
    is_deepseek = (
        spec.scoring_func == "sigmoid"
        and spec.correction_bias == "score"
        and spec.weights_from == "score"
        and spec.renormalize
        and spec.renormalize_floor == 0.0
        and spec.logits_dtype == spec.topk_weights_dtype == "float32"
        and spec.logit_multiplier == 1.0
        and spec.logit_softcapping is None
        and not (spec.num_zero_experts or spec.num_shared_gates or spec.per_expert_scale or spec.global_scale)
    )
    if not is_deepseek or spec.top_k > 8:
        return False
    if spec.n_group == 1:
        return spec.num_experts <= 384
    per_group = spec.num_experts // spec.n_group
    small = per_group <= 32 and per_group * spec.topk_group <= 128 and spec.num_experts <= 256
    return small and spec.group_score == "top2_sum" and spec.n_group <= 32


def takes_gemm(spec: RouterSpec, weight: Tensor) -> bool:
    """True if the spec's logits are a plain bfloat16 product with float32 logits."""
    plain = spec.input_norm_eps is None and not spec.linear_bias and spec.logits_dtype == "float32"
    return plain and weight.dtype == torch.bfloat16


def is_transformers_softmax(spec: RouterSpec) -> bool:
    """True for the routers that Transformers writes as linear, softmax in float32, topk, and perhaps a division."""
    plain = spec.correction_bias is None and spec.n_group == 1 and spec.weights_from == "score"
    extras = spec.num_zero_experts or spec.num_shared_gates or spec.per_expert_scale or spec.hash_routing
    return spec.scoring_func == "softmax" and plain and not extras and spec.input_norm_eps is None


def transformers_like(spec: RouterSpec, bias: Tensor | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(hidden, weight) -> ids and weights by the operations of Transformers' softmax routers."""
    # Where its logits are float32 it widens both operands in each call.
    dtype = torch.float32 if spec.logits_dtype == "float32" else torch.bfloat16

    def route(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)
        probabilities = torch.nn.functional.softmax(logits, dim=-1, dtype=torch.float32)
        values, ids = torch.topk(probabilities, spec.top_k, dim=-1)
        if spec.renormalize:
            values = values / values.sum(dim=-1, keepdim=True)
        return ids, (values * spec.routed_scaling_factor).to(logits.dtype)

    return route
