"""A constant weight, packed in the layouts that GEMMs on a CPU read fastest."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moegate.chunks import in_sizes

# What PyTorch's own compiler calls for packed weights; private, so that it is asked for and not taken for granted.
_LINEAR = "_linear_pointwise"
# A hint to oneDNN. One layout serves every number of tokens: those made for their own were no faster beyond noise.
_PACKED_FOR_TOKENS = 8
# Up to about so many tokens a GEMM is bound by reading the weight, so that half the bytes win; beyond, by arithmetic,
# in which oneDNN is ahead. docs/cpu.md has what comes of it.
_HALF_MAX_TOKENS = 8


class PackedWeight(NamedTuple):
    """The weight [R, K] for GEMMs in `dtype`."""

    dtype: torch.dtype
    packed: Tensor
    """In oneDNN's layout, which F.linear would make anew in each call."""
    half: Any = None
    """In FBGEMM's float16 layout, times a power of two, with no bit lost; None if that cannot be."""
    unscale: float = 1.0

    def linear(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """[M, K], M at least 1, to [M, R]: `hidden @ weight.T + bias`, all in `dtype`."""
        if self.half is not None and hidden.shape[0] <= _HALF_MAX_TOKENS:
            logits: Tensor = torch.ops.quantized.linear_dynamic_fp16(hidden, self.half).mul_(self.unscale)
            return logits if bias is None else logits.add_(bias)
        linear = getattr(torch.ops.mkldnn, _LINEAR)
        return in_sizes(hidden, lambda rows: linear(rows, self.packed, bias, "none", [], ""))


def pack(weight: Tensor, dtype: torch.dtype) -> PackedWeight | None:
    """A weight for GEMMs in `dtype`; None where packing gains nothing."""
    if not weight.is_cpu or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, _LINEAR):
        return None
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), _PACKED_FOR_TOKENS)
    half, unscale = (None, 1.0) if dtype != torch.float32 or weight.dtype == dtype else _in_float16(weight.float())
    return PackedWeight(dtype, packed, half, unscale)


def _in_float16(weight: Tensor) -> tuple[Any, float]:
    """The weight for a GEMM of float32 with float16, if a power of two scales it to float16 exactly.

    A bfloat16 has 8 bits of 24, a float16 11: only the exponents may not fit, and those of one matrix do.
    """
    largest = float(weight.abs().amax())
    has_product = hasattr(torch.ops.quantized, "linear_dynamic_fp16")
    if not has_product or "fbgemm" not in torch.backends.quantized.supported_engines or not 0 < largest < math.inf:
        return None, 1.0
    scale = 2.0 ** (15 - math.frexp(largest)[1])  # the largest just below 2**15, float16's ends at 2**16
    scaled = weight * scale
    if scale > 2.0**40 or not scaled.half().float().equal(scaled):
        return None, 1.0
    return torch.ops.quantized.linear_prepack_fp16(scaled, None), 1 / scale
