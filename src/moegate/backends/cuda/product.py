"""cuBLAS's product for many tokens, so that it fills the chip and runs on tensor cores: see products.cuh.

A library gives each block a tile of the logits, of which few tokens make few. Cut along K into shares, which it
multiplies as a batch, they are as many as there are multiprocessors. A product of float32 matrices does not use tensor
cores, for it would round to 11 bits there; as the sum of bfloat16 ones a float32 weight keeps its bits (contract 1.1
has the ends of the range), and so does the weight that an input norm's scale was multiplied into.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from moegate.backends.cuda import jit
from moegate.backends.cuda.alignment import aligned_rows
from moegate.backends.cuda.memory import empty
from moegate.backends.cuda.sources import InputNorm, prepare_source, sum_source
from moegate.backends.cuda.tiling import shares_of_product
from moegate.warn import warn_once

_PREPARE_FIELDS, _SUM_FIELDS = "PPPPPqqi0q", "PPPqqi0q"  # of products.cuh's arguments, with the padding
_THREADS = 256
_BLOCKS_OF_SM = 8  # of 256 threads: as many as are on a multiprocessor at once


def operand_of(weight: torch.dtype, *, has_norm: bool) -> torch.dtype:
    """The dtype that cuBLAS multiplies in place of a weight's, and with it."""
    return torch.bfloat16 if _is_taken_apart(weight, has_norm=has_norm) else weight


def unsupported(hidden: torch.dtype, weight: torch.dtype, hidden_size: int, *, has_norm: bool) -> str | None:
    """None, or why the logits are not made of cuBLAS's products."""
    operand = operand_of(weight, has_norm=has_norm)
    if hidden == operand and (hidden_size % 8 == 0 or not _is_taken_apart(weight, has_norm=has_norm)):
        return None  # asked in every call of many tokens, so that no text is made before
    beside = f"beside a weight in {_name(weight)}{' and an input norm' * has_norm}"
    if hidden != operand:
        return f"{beside}, cuBLAS takes hidden states in {_name(operand)}, and these are in {_name(hidden)}"
    return f"{beside}, K = {hidden_size} is not a multiple of 8"


def _is_taken_apart(weight: torch.dtype, *, has_norm: bool) -> bool:
    return weight == torch.float32 or has_norm


def warn_of_plain_product(reason: str) -> None:
    """Says once that PyTorch's operations run where cuBLAS is `unsupported`."""
    warn_once(f"{reason}: PyTorch's operations make the logits where cuBLAS would, more slowly")


def parts_of(weight: torch.dtype, norm: InputNorm | None) -> int:
    """The numbers with 16 bits that an element of the weight, times the norm's scale, is the sum of."""
    if norm is None:
        return 3 if weight == torch.float32 else 1
    return 2 if weight == norm.scale == torch.bfloat16 else 3  # a product of two numbers of 8 bits has 16


class Products(NamedTuple):
    """What the logits are made of."""

    shares: Tensor
    """[S, M, C] float32, to be added up; C is parts * R, or more."""
    norm_factors: Tensor | None
    """[M] float32, what the sums are multiplied by, with an input norm."""


class Product:
    """The products of one shape and weight dtype on a device; `product_of` makes them."""

    def __init__(
        self,
        hidden_size: int,
        rows: int,
        weight: torch.dtype,
        device: torch.device,
        norm: InputNorm | None = None,
        *,
        pdl: bool,
    ) -> None:
        self.operand = operand_of(weight, has_norm=norm is not None)
        """The dtype of the hidden states."""
        self.weight_parts = parts_of(weight, norm)
        columns = self.weight_parts * rows
        # Any other number takes cuBLAS two to four times as long (docs/cuda.md).
        self._columns = -(-columns // 8) * 8 if hidden_size % 8 == 0 else columns
        self._num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._hidden_size, self._has_norm = hidden_size, norm is not None
        self._prepare = None
        if self._columns != rows:
            text = prepare_source(hidden_size, rows, self.operand, weight, self.weight_parts, self._columns, norm)
            self._prepare = jit.load(text, device).kernel("prepare_product", _PREPARE_FIELDS, _THREADS, pdl=pdl)

    def __call__(self, hidden: Tensor, weight: Tensor, input_scale: Tensor | None, stream: int) -> Products:
        """Of [M, K] and [R, K] on the stream, the current one; M is at least 1."""
        factors = None
        if self._prepare is not None:
            hidden = aligned_rows(hidden, "hidden") if self._has_norm else hidden
            weight, factors = self.prepared(hidden, weight, input_scale, stream)
        shares = shares_of_product(len(hidden), len(weight), self._hidden_size, self._num_sms)
        if shares == 1:
            return Products(torch.mm(hidden, weight.t(), out_dtype=torch.float32).unsqueeze(0), factors)
        cut = shares, self._hidden_size // shares
        of_hidden, of_weight = hidden.unflatten(1, cut), weight.unflatten(1, cut)
        products = torch.bmm(of_hidden.transpose(0, 1), of_weight.permute(1, 2, 0), out_dtype=torch.float32)
        return Products(products, factors)

    def prepared(
        self, hidden: Tensor, weight: Tensor, input_scale: Tensor | None, stream: int
    ) -> tuple[Tensor, Tensor | None]:
        """The parts [C, K] of a weight [R, K], and `Products.norm_factors`, on the current device."""
        assert self._prepare is not None
        weight = aligned_rows(weight, "weight")
        parts = empty((self._columns, self._hidden_size), self.operand)
        factors = empty((len(hidden),), torch.float32) if self._has_norm else None
        threads = weight.numel() // 8 + (32 * len(hidden) if self._has_norm else 0)
        self._prepare.launch(
            _grid(threads, self._num_sms),
            stream,
            weight.data_ptr(),
            parts.data_ptr(),
            0 if input_scale is None else input_scale.data_ptr(),
            hidden.data_ptr(),
            0 if factors is None else factors.data_ptr(),
            weight.stride(0),
            hidden.stride(0),
            len(hidden),
        )
        return parts, factors


product_of = cache(Product)


def are_logits(products: Tensor, rows: int, bias: torch.dtype | None, logits: torch.dtype) -> bool:
    """True if products [S, M, C] of one share and part need neither a bias nor a rounding."""
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
        """[S, M, C] -> logits [M, R]; both contiguous."""
        address, count = 0 if bias is None else bias.data_ptr(), logits.numel()
        grid = _grid(count, self._num_sms)
        shares, _, columns = products.shape
        self._sum.launch(grid, stream, products.data_ptr(), address, logits.data_ptr(), count, columns, shares)


sum_of = cache(Sum)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """[M, K] and [R, K] (+ [R]) -> [M, R], on the current stream of the current device; M is at least 1."""
    (rows, hidden_size), device, stream = weight.shape, hidden.device, torch.cuda.current_stream().cuda_stream
    bias_dtype = None if bias is None else bias.dtype
    product = product_of(hidden_size, rows, weight.dtype, device, None, pdl=True)
    products = product(hidden, weight, None, stream).shares
    if are_logits(products, rows, bias_dtype, out_dtype):
        return products[0]
    made = empty((len(hidden), rows), out_dtype)
    sum_of(rows, product.weight_parts, bias_dtype, out_dtype, device)(products, bias, made, stream)
    return made


def _grid(threads: int, num_sms: int) -> tuple[int, int]:
    return min(_BLOCKS_OF_SM * num_sms, -(-threads // _THREADS)), 1


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
