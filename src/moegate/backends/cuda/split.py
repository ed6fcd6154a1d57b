"""Launches split.cuh around cuBLAS: bfloat16 hidden states and a float32 weight to logits, for many tokens.

A product of float32 matrices does not use tensor cores, for it would round to 11 bits there. As the sum of three
bfloat16 numbers a weight keeps its bits, and three products on tensor cores take a fraction of the one without them.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moegate.backends.cuda import jit
from moegate.backends.cuda.alignment import aligned_rows
from moegate.backends.cuda.memory import empty
from moegate.backends.cuda.sources import split_source

_SPLIT_FIELDS, _SUM_FIELDS = "PPq", "PPPq"  # SplitArguments and SumArguments of split.cuh
_THREADS = 256
_BLOCKS_OF_SM = 8  # as many as are on a multiprocessor at once


def unsupported(hidden: torch.dtype, weight: torch.dtype, norm_eps: float | None) -> str | None:
    """None, or why a product is not taken apart."""
    if (hidden, weight) != (torch.bfloat16, torch.float32):
        return f"{hidden} x {weight} is not bfloat16 x float32"
    return None if norm_eps is None else "the normed input is float32"


class SplitKernels:
    """The kernels for one shape and set of dtypes, loaded for a device; `split_kernels` makes them."""

    def __init__(
        self,
        hidden_size: int,
        rows: int,
        bias: torch.dtype | None,
        logits: torch.dtype,
        device: torch.device,
        *,
        pdl: bool,
    ) -> None:
        module = jit.load(split_source(hidden_size, rows, bias, logits), device)
        self._split = module.kernel("split_weight", _SPLIT_FIELDS, _THREADS, pdl=pdl)
        self._sum = module.kernel("sum_products", _SUM_FIELDS, _THREADS, pdl=pdl)
        self._most_blocks = _BLOCKS_OF_SM * torch.cuda.get_device_properties(device).multi_processor_count

    def products(self, hidden: Tensor, weight: Tensor, stream: int) -> Tensor:
        """[M, K] and [R, K] -> the products [M, 3 R] of its parts, on the stream, the current one; M is at least 1."""
        return torch.mm(hidden, self.parts(weight, stream).t(), out_dtype=torch.float32)

    def parts(self, weight: Tensor, stream: int) -> Tensor:
        """[R, K] float32 -> [3 R, K] bfloat16, on the current device."""
        weight = aligned_rows(weight, "weight")
        rows, hidden_size = weight.shape
        parts = empty((3 * rows, hidden_size), torch.bfloat16)
        grid = self._grid(weight.numel() // 8)
        self._split.launch(grid, stream, weight.data_ptr(), parts.data_ptr(), weight.stride(0))
        return parts

    def add_up(self, products: Tensor, bias: Tensor | None, logits: Tensor, stream: int) -> None:
        """[M, 3 R] float32 -> logits [M, R]; both contiguous."""
        count = logits.numel()
        address = 0 if bias is None else bias.data_ptr()
        self._sum.launch(self._grid(count), stream, products.data_ptr(), address, logits.data_ptr(), count)

    def _grid(self, pieces: int) -> tuple[int, int]:
        return min(self._most_blocks, -(-pieces // _THREADS)), 1


split_kernels = cache(SplitKernels)
