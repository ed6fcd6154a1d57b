"""Hidden states to logits, with PyTorch's own matrix products."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class PreparedWeight(NamedTuple):
    """A weight that will not change, in the layouts that the CPU's products want."""

    plain: Tensor
    """[R, K] in the dtype of the product: best for one token, which is a matrix-vector product."""
    packed: Tensor
    """The same in oneDNN's own layout, which F.linear would make anew in each call."""


_PACKED_FOR_TOKENS = 8  # a hint to oneDNN; measured within 5 % of the best at 2 to 512 tokens


def prepare(weight: Tensor, out_dtype: torch.dtype) -> PreparedWeight | None:
    """Prepares the weight [R, K] of a gate whose logits have `out_dtype`; None where nothing is to gain."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    plain = weight.to(_product_dtype(weight.dtype, weight.dtype, out_dtype)).contiguous()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported() and plain.dtype != torch.float32:
        return None
    return PreparedWeight(plain, torch.ops.mkldnn._reorder_linear_weight(plain, _PACKED_FOR_TOKENS))


def router_gemm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, prepared: PreparedWeight | None = None
) -> Tensor:
    """[M, K] x [R, K] (+ [R]) -> logits [M, R], accumulated in float32 and rounded at most once."""
    if hidden.device.type == "cuda" and hidden.dtype == weight.dtype != torch.float32:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return (logits if bias is None else logits + bias.float()).to(out_dtype)
    dtype = torch.float32
    if hidden.device.type == "cpu":
        dtype = _product_dtype(hidden.dtype, weight.dtype, out_dtype)
    if bias is not None and bias.dtype != dtype:
        dtype, bias = torch.float32, bias.float()
    if prepared is None or prepared.plain.dtype != dtype:
        logits = _product(hidden.to(dtype), weight.to(dtype), bias)
    elif len(hidden) <= 1:
        logits = _product(hidden.to(dtype), prepared.plain, bias)
    else:
        logits = _product(hidden.to(dtype), prepared.packed, bias, is_packed=True)
    return logits.to(out_dtype)


def normed_input(hidden: Tensor, input_scale: Tensor, eps: float) -> Tensor:
    """[M, K] -> its RMS norm times input_scale [K] times K**-0.5, in float32."""
    hidden = hidden.float()
    normed = hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps)
    return normed * (input_scale.float() * hidden.shape[1] ** -0.5)


def _product_dtype(hidden: torch.dtype, weight: torch.dtype, out: torch.dtype) -> torch.dtype:
    """The dtype of a CPU's product: its half-precision ones sum in float32 and round once, at the end."""
    return out if hidden == weight == out else torch.float32


_precision_lock = threading.Lock()


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None, is_packed: bool = False) -> Tensor:
    """hidden @ weight.T + bias; in float32, exact to float32 whatever `set_float32_matmul_precision` allows.

    "high" and "medium" let PyTorch multiply in TF32 or bfloat16: 2**-11 of a logit swaps experts.
    The setting is the process's, so that threads take turns in changing it.
    """
    settings = torch.backends.cuda.matmul if hidden.device.type == "cuda" else torch.backends.mkldnn.matmul
    if hidden.dtype != torch.float32 or settings.fp32_precision in ("ieee", "none"):
        return _linear(hidden, weight, bias, is_packed)
    with _precision_lock:
        before = settings.fp32_precision
        settings.fp32_precision = "ieee"
        try:
            return _linear(hidden, weight, bias, is_packed)
        finally:
            settings.fp32_precision = before


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, is_packed: bool) -> Tensor:
    if is_packed:
        return torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], "")
    return F.linear(hidden, weight, bias)
