"""Peers: FlashInfer's GEMM and top-k where FlashInfer supports the spec, and Transformers' operations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from moegate.flashinfer import limits
from moegate.flashinfer.functions import bound_gemm, bound_top_k
from moegate.measure.timing import reason_of
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec


def flashinfer_gemm(spec: RouterSpec, device: torch.device, tokens: int) -> Callable[[Tensor, Tensor], Tensor] | str:
    """(hidden, weight) -> float32 logits; or the reason why FlashInfer has no GEMM for this spec."""
    known = limits.GEMMS.get((spec.hidden_size, spec.num_gate_rows))
    if known is None or tokens > limits.MAX_TOKENS:
        return f"not supported: K={spec.hidden_size} N={spec.num_gate_rows} M={tokens}"
    try:
        gemm = bound_gemm(known, device, spec, pdl=True)
    except Exception as error:  # importing FlashInfer can raise anything
        return f"absent: {reason_of(error)}"
    return lambda hidden, weight: gemm(hidden, weight, None)


def flashinfer_top_k(spec: RouterSpec, tensors: RouterTensors) -> Callable[[Tensor], tuple[Tensor, Tensor]] | str:
    """Float32 logits -> ids and weights; or the reason why FlashInfer's top-k cannot compute this spec."""
    refused = limits.top_k_refuses(spec)
    if refused is not None:
        return f"not supported: {refused}"
    bias = tensors.e_score_correction_bias
    assert bias is not None
    try:
        top_k = bound_top_k(limits.TOP_K, bias.device, spec, pdl=True)
    except Exception as error:
        return f"absent: {reason_of(error)}"
    return lambda logits: top_k(logits, bias)


def is_transformers_softmax(spec: RouterSpec) -> bool:
    """True for routers that Transformers computes as linear, softmax in float32, topk and at most a division."""
    known = ("hidden_size", "num_experts", "top_k", "renormalize", "routed_scaling_factor", "linear_bias")
    dtypes = ("logits_dtype", "weight_dtype", "topk_ids_dtype", "topk_weights_dtype")
    others = [each for each in dataclasses.fields(spec) if each.name not in (*known, *dtypes)]
    return all(getattr(spec, each.name) == each.default for each in others)


def transformers_like(spec: RouterSpec, bias: Tensor | None) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(hidden, weight) -> ids and weights by the operations of Transformers' softmax routers."""
    # For float32 logits, Transformers casts both operands to float32 in each call.
    dtype = torch.float32 if spec.logits_dtype == "float32" else torch.bfloat16

    def route(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias)
        probabilities = torch.nn.functional.softmax(logits, dim=-1, dtype=torch.float32)
        values, ids = torch.topk(probabilities, spec.top_k, dim=-1)
        if spec.renormalize:
            values = values / values.sum(dim=-1, keepdim=True)
        return ids, (values * spec.routed_scaling_factor).to(logits.dtype)

    return route
