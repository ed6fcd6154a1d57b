"""Hidden states to logits, with PyTorch's own matrix products."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegate.backends.torch.pieces import in_sizes
from moegate.backends.torch.prepared import PreparedWeight
from moegate.plain import are_plain, can_be_asked
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec
from moegate.warn import warn_once


def router_gemm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, prepared: PreparedWeight | None = None
) -> Tensor:
    """[M, K] x [R, K] (+ [R]) -> logits [M, R], accumulated in float32 and rounded at most once."""
    are_half = hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32
    if are_half and are_plain((hidden, weight)) and _widens(hidden):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return (logits if bias is None else logits + bias.float()).to(out_dtype)
    dtype = dtype_of_product(hidden.dtype, weight, bias, out_dtype) if hidden.is_cpu else torch.float32
    if bias is not None:
        bias = bias.to(dtype)
    if prepared is None or prepared.dtype != dtype or not hidden.shape[0]:
        logits = _linear(hidden.to(dtype), weight.to(dtype), bias)
    else:
        logits = _linear(hidden.to(dtype), prepared, bias)
    return logits if dtype == out_dtype else logits.to(out_dtype)


def _widens(hidden: Tensor) -> bool:
    """True where a product of half-precision matrices can be had in float32."""
    return torch.version.hip is None or _widens_on_amd(hidden.device, hidden.dtype)


@cache
def _widens_on_amd(device: torch.device, dtype: torch.dtype) -> bool:
    """Asked by a try: builds for ROCm of torch 2.8 and of 2.9's beginning refuse (sgl-project/sglang#34681)."""
    one = torch.ones((1, 1), dtype=dtype, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        warn_once(f"torch.mm(out_dtype=torch.float32) fails on {device} ({reason}); operands are widened to float32")
        return False
    return True


def logits(
    hidden: Tensor, weight: Tensor, spec: RouterSpec, tensors: RouterTensors, prepared: PreparedWeight | None
) -> Tensor:
    """Hidden states [M, K] to the logits [M, R] of a spec, with its norm, bias and rounding."""
    if spec.input_norm_eps is not None:
        assert tensors.input_scale is not None
        hidden = normed_input(hidden, tensors.input_scale, spec.input_norm_eps)
    return router_gemm(hidden, weight, tensors.bias, getattr(torch, spec.logits_dtype), prepared)


def normed_input(hidden: Tensor, input_scale: Tensor, eps: float) -> Tensor:
    """[M, K] -> its RMS norm times input_scale [K] times K**-0.5, in float32."""
    hidden = hidden.float()
    normed = hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps)
    scaled: Tensor = normed * (input_scale.float() * hidden.shape[1] ** -0.5)
    return scaled


def product_dtype(hidden: torch.dtype, weight: torch.dtype, out: torch.dtype) -> torch.dtype:
    """The dtype of a CPU's product: its half-precision ones sum in float32 and round once, at the end."""
    return out if hidden == weight == out else torch.float32


def dtype_of_product(hidden: torch.dtype, weight: Tensor, bias: Tensor | None, out: torch.dtype) -> torch.dtype:
    """The same with a bias, which in another dtype needs float32."""
    dtype = product_dtype(hidden, weight.dtype, out)
    return dtype if bias is None or bias.dtype == dtype else torch.float32


def _linear(hidden: Tensor, weight: Tensor | PreparedWeight, bias: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias`; in float32, exact to float32 whatever the process allows PyTorch."""
    if hidden.dtype != torch.float32:
        return _linear_as_allowed(hidden, weight, bias)
    with _precision_lock:  # not while another thread has the setting changed
        allows_less = _allows_less_than_float32(hidden.is_cuda)
    if not allows_less:
        return _linear_as_allowed(hidden, weight, bias)
    with _full_float32(hidden.is_cuda):
        return _linear_as_allowed(hidden, weight, bias)


def _linear_as_allowed(hidden: Tensor, weight: Tensor | PreparedWeight, bias: Tensor | None) -> Tensor:
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # it answers in fewer bits
        with torch.autocast(kind, enabled=False):
            return _linear_as_allowed(hidden, weight, bias)
    if isinstance(weight, PreparedWeight):
        return weight.linear(hidden, bias)
    if hidden.dtype == torch.float32 or not can_be_asked(hidden):
        return F.linear(hidden, weight, bias)
    return in_sizes(hidden, lambda rows: F.linear(rows, weight, bias))


# `torch.set_float32_matmul_precision("high")`, which many programs call, lets PyTorch multiply float32
# in TF32 ("medium": in bfloat16). 2**-11 of a logit swaps experts, so that a router must not take part.
# From torch 2.9 on the setting has a place for each kind of device; before, one for all.
_HAS_SETTING_BY_DEVICE = hasattr(torch.backends.mkldnn, "matmul")
_precision_lock = threading.Lock()


def _allows_less_than_float32(is_cuda: bool) -> bool:
    if _HAS_SETTING_BY_DEVICE:
        return _setting(is_cuda).fp32_precision not in ("ieee", "none")
    return torch.get_float32_matmul_precision() != "highest"


@contextmanager
def _full_float32(is_cuda: bool) -> Iterator[None]:
    """Forbids it for a moment. The setting is the process's, so that threads take turns."""
    with _precision_lock:
        if _HAS_SETTING_BY_DEVICE:
            setting = _setting(is_cuda)
            before, setting.fp32_precision = setting.fp32_precision, "ieee"
        else:
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            if _HAS_SETTING_BY_DEVICE:
                setting.fp32_precision = before
            else:
                torch.set_float32_matmul_precision(before)


def _setting(is_cuda: bool) -> Any:
    return torch.backends.cuda.matmul if is_cuda else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
