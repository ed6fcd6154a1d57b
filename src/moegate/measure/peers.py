"""The peers: FlashInfer where it takes the shape, cuBLAS with the best selection, PyTorch eager and compiled."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moegate.backends.flashinfer import limits
from moegate.measure.record import version
from moegate.measure.timing import reason_of
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec


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
    known = limits.GEMMS.get((hidden_size, num_rows))
    if module is None:
        return found
    if known is None or tokens > limits.MAX_TOKENS:
        return f"not supported: K={hidden_size} N={num_rows} M={tokens}"
    function = getattr(module, known.name)

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
    refused = limits.top_k_refuses(spec)
    if refused is not None:
        return f"not supported: {refused}"
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
