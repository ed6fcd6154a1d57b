"""cuBLAS's product for many tokens, so that it fills the chip and runs on tensor cores: see products.cuh.

A library gives each block a tile of the logits, of which few tokens make few. Cut along K into shares, which it
multiplies as a batch, they are as many as there are multiprocessors. A product of float32 matrices does not use tensor
cores, for it would round to 11 bits there; as the sum of three bfloat16 ones a float32 weight keeps its bits (contract
1.1 has the ends of the range).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moegate.backends.cuda import jit
from moegate.backends.cuda.alignment import aligned_rows
from moegate.backends.cuda.memory import empty
from moegate.backends.cuda.sources import split_source, sum_source
from moegate.backends.cuda.tiling import shares_of_product

_SPLIT_FIELDS, _SUM_FIELDS = "PPq", "PPPqi0q"  # SplitArguments and SumArguments of products.cuh, with the padding
_THREADS = 256
_BLOCKS_OF_SM = 8  # of 256 threads: as many as are on a multiprocessor at once


def operand_of(weight: torch.dtype) -> torch.dtype:
    """The dtype that cuBLAS multiplies in place of a weight's, and with it."""
    return torch.bfloat16 if weight == torch.float32 else weight


def unsupported(hidden: torch.dtype, weight: torch.dtype, hidden_size: int, norm_eps: float | None) -> str | None:
    """None, or why the logits are not made of cuBLAS's products."""
    if norm_eps is not None:
        return "the normed input is float32"
    if hidden != operand_of(weight):
        return f"{hidden} x {weight} is not {operand_of(weight)} x {weight}"
    if weight == torch.float32 and hidden_size % 8 != 0:
        return f"K = {hidden_size} of a float32 weight is not a multiple of 8"
    return None


class Product:
    """The products of one shape and weight dtype on a device; `product_of` makes them."""

    def __init__(self, hidden_size: int, rows: int, weight: torch.dtype, device: torch.device, *, pdl: bool) -> None:
        self.weight_parts = 3 if weight == torch.float32 else 1
        """The numbers with 16 bits that an element of the weight is the sum of."""
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._hidden_size, self._rows = hidden_size, rows
        self._split = None
        if self.weight_parts > 1:
            module = jit.load(split_source(hidden_size, rows), device)
            self._split = module.kernel("split_weight", _SPLIT_FIELDS, _THREADS, pdl=pdl)

    def __call__(self, hidden: Tensor, weight: Tensor, stream: int) -> Tensor:
        """[M, K] and [R, K] -> [S, M, parts * R] float32, on the stream, the current one; M is at least 1."""
        if self._split is not None:
            weight = self.parts(weight, stream)
        shares = shares_of_product(len(hidden), len(weight), self._hidden_size, self._num_sms)
        if shares == 1:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32).unsqueeze(0)
        cut = shares, self._hidden_size // shares
        of_hidden, of_weight = hidden.unflatten(1, cut), weight.unflatten(1, cut)
        return torch.bmm(of_hidden.transpose(0, 1), of_weight.permute(1, 2, 0), out_dtype=torch.float32)

    def parts(self, weight: Tensor, stream: int) -> Tensor:
        """[R, K] float32 -> [3 R, K] bfloat16, on the current device."""
        assert self._split is not None
        weight = aligned_rows(weight, "weight")
        parts = empty((3 * self._rows, self._hidden_size), torch.bfloat16)
        grid = _grid(weight.numel() // 8, self._num_sms)
        self._split.launch(grid, stream, weight.data_ptr(), parts.data_ptr(), weight.stride(0))
        return parts


product_of = cache(Product)


def are_logits(products: Tensor, rows: int, bias: torch.dtype | None, logits: torch.dtype) -> bool:
    """True if products [S, M, parts * R] of one share and part need neither a bias nor a rounding."""
    is_one = products.shape[0] == 1 and products.shape[2] == rows
    return is_one and bias is None and logits == torch.float32


class Sum:
    """What products add up to, where no selection follows; `sum_of` makes them."""

    def __init__(
        self, rows: int, weight_parts: int, bias: torch.dtype | None, logits: torch.dtype, device: torch.device
    ) -> None:
        module = jit.load(sum_source(rows, weight_parts, bias, logits), device)
        self._sum = module.kernel("sum_products", _SUM_FIELDS, _THREADS)
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count

    def __call__(self, products: Tensor, bias: Tensor | None, logits: Tensor, stream: int) -> None:
        """[S, M, parts * R] -> logits [M, R]; both contiguous."""
        address, count = 0 if bias is None else bias.data_ptr(), logits.numel()
        grid = _grid(count, self._num_sms)
        self._sum.launch(grid, stream, products.data_ptr(), address, logits.data_ptr(), count, len(products))


sum_of = cache(Sum)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """[M, K] and [R, K] (+ [R]) -> [M, R], on the current stream of the current device; M is at least 1."""
    (rows, hidden_size), device, stream = weight.shape, hidden.device, torch.cuda.current_stream().cuda_stream
    bias_dtype = None if bias is None else bias.dtype
    product = product_of(hidden_size, rows, weight.dtype, device, pdl=True)
    products = product(hidden, weight, stream)
    if are_logits(products, rows, bias_dtype, out_dtype):
        return products[0]
    made = empty((len(hidden), rows), out_dtype)
    sum_of(rows, product.weight_parts, bias_dtype, out_dtype, device)(products, bias, made, stream)
    return made


def _grid(pieces: int, num_sms: int) -> tuple[int, int]:
    return min(_BLOCKS_OF_SM * num_sms, -(-pieces // _THREADS)), 1
