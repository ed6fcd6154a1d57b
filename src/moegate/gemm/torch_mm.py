"""PyTorch's GEMMs: hidden states to logits on every device that PyTorch has."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegate.chunks import are_many, in_chunks, in_sizes
from moegate.contract.limits import MAX_DECODE_TOKENS
from moegate.gemm.cpu_packed import PackedWeight, pack
from moegate.gemm.router_gemm import promises_bits
from moegate.halves import Call, Gemm
from moegate.plain import are_plain, can_be_asked
from moegate.problem import Problem
from moegate.warn import warn_once


class TorchMm(Gemm):
    """Runs everything, everywhere; the others are faster where they run."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return "mm"

    def breaks(self, problem: Problem, num_tokens: int) -> str | None:
        """The promise that it does not keep where router_gemm does."""
        if promises_bits(problem, num_tokens):
            return f"a token's bits would depend on M up to {MAX_DECODE_TOKENS}"
        return None

    def prepare(self, problem: Problem, weight: Tensor) -> PackedWeight | None:
        """On a CPU, a frozen weight packed for its GEMM."""
        spec, dtypes = problem.spec, problem.dtypes
        hidden_dtype = weight.dtype if spec.input_norm_eps is None else torch.float32
        return pack(weight, dtype_of_gemm(hidden_dtype, weight.dtype, dtypes.bias, problem.logits_dtype))

    def bind(self, problem: Problem, device: torch.device) -> BoundMm:
        """Nothing is to be compiled."""
        return BoundMm(problem)


TORCH_MM = TorchMm()


class BoundMm:
    """The GEMM of one spec. On a CPU many rows are multiplied in chunks.

    `slow_because`: a warning of each call, once a process, where this GEMM takes the place of a faster one.
    """

    num_terms = holds_dependents_to = 0

    def __init__(self, problem: Problem, slow_because: str | None = None) -> None:
        self._slow_because = slow_because
        self._norm_eps, self._logits_dtype = problem.spec.input_norm_eps, problem.logits_dtype

    def __call__(self, call: Call) -> Tensor:
        """The logits [M, R]."""
        if self._slow_because is not None:
            warn_once(self._slow_because)
        hidden, weight, packed = call.hidden, call.weight, call.prepared.get(TORCH_MM)
        assert packed is None or isinstance(packed, PackedWeight)
        if not are_many(hidden):
            return self._rows(hidden, weight, call, packed)
        bias_dtype = None if call.tensors.bias is None else call.tensors.bias.dtype
        hidden_dtype = hidden.dtype if self._norm_eps is None else torch.float32
        dtype = dtype_of_gemm(hidden_dtype, weight.dtype, bias_dtype, self._logits_dtype)
        if packed is None or packed.dtype != dtype:
            weight = weight.to(dtype)  # once, and not for each chunk
        is_copied = dtype != hidden.dtype or self._norm_eps is not None

        def compute(rows: slice) -> Tensor:
            return self._rows(hidden[rows], weight, call, packed)

        return in_chunks(len(hidden), len(weight), compute, copied=hidden.shape[1] if is_copied else 0)

    logits = __call__

    def _rows(self, hidden: Tensor, weight: Tensor, call: Call, packed: PackedWeight | None) -> Tensor:
        if self._norm_eps is not None:
            assert call.tensors.input_scale is not None
            hidden = normed_input(hidden, call.tensors.input_scale, self._norm_eps)
        return router_gemm(hidden, weight, call.tensors.bias, self._logits_dtype, packed)


def router_gemm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, packed: PackedWeight | None = None
) -> Tensor:
    """[M, K] x [R, K] (+ [R]) -> logits [M, R], accumulated in float32 and rounded at most once."""
    are_half = hidden.is_cuda and hidden.dtype == weight.dtype != torch.float32
    if are_half and are_plain((hidden, weight)) and _widens(hidden):
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return (logits if bias is None else logits + bias.float()).to(out_dtype)
    bias_dtype = None if bias is None else bias.dtype
    dtype = dtype_of_gemm(hidden.dtype, weight.dtype, bias_dtype, out_dtype) if hidden.is_cpu else torch.float32
    if bias is not None:
        bias = bias.to(dtype)
    if packed is None or packed.dtype != dtype or not hidden.shape[0]:
        logits = _linear(hidden.to(dtype), weight.to(dtype), bias)
    else:
        logits = _linear(hidden.to(dtype), packed, bias)
    return logits if dtype == out_dtype else logits.to(out_dtype)


def _widens(hidden: Tensor) -> bool:
    """True where a GEMM of half-precision matrices can write float32."""
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


def normed_input(hidden: Tensor, input_scale: Tensor, eps: float) -> Tensor:
    """[M, K] -> its RMS norm times input_scale [K] times K**-0.5, in float32."""
    hidden = hidden.float()
    normed = hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps)
    scaled: Tensor = normed * (input_scale.float() * hidden.shape[1] ** -0.5)
    return scaled


def dtype_of_gemm(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None, logits_dtype: torch.dtype
) -> torch.dtype:
    """The dtype of a GEMM on a CPU. In half precision the GEMM sums in float32 and rounds once, at the end.

    A bias in another dtype is added in float32.
    """
    dtype = logits_dtype if hidden_dtype == weight_dtype == logits_dtype else torch.float32
    return dtype if bias_dtype is None or bias_dtype == dtype else torch.float32


def _linear(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias`; in float32, exact to float32 whatever the process allows PyTorch."""
    if hidden.dtype != torch.float32:
        return _linear_as_allowed(hidden, weight, bias)
    with _precision_lock:  # not while another thread has the setting changed
        allows_less = _allows_less_than_float32(hidden.is_cuda)
    if not allows_less:
        return _linear_as_allowed(hidden, weight, bias)
    with _full_float32(hidden.is_cuda):
        return _linear_as_allowed(hidden, weight, bias)


def _linear_as_allowed(hidden: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):  # it answers in fewer bits
        with torch.autocast(kind, enabled=False):
            return _linear_as_allowed(hidden, weight, bias)
    if isinstance(weight, PackedWeight):
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
