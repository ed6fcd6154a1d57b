"""Rows that can be read 16 bytes at a time."""

from __future__ import annotations

from torch import Tensor

from moegate.warn import warn_once

_BYTES = 16


def are_surely_aligned(addresses: int, strides: int) -> bool:
    """True only if `is_aligned` is, of tensors whose addresses and whose strides, in elements, are given as one (by |).

    Every call asks this of its two tensors, and it is the quicker question.
    """
    return addresses % _BYTES == 0 and strides % _BYTES == 0


def is_aligned(tensor: Tensor) -> bool:
    """True if every row of `tensor` [M, K] starts at a multiple of 16 bytes."""
    rows_apart = tensor.stride(0) if tensor.shape[0] > 1 else 0
    return (tensor.data_ptr() | rows_apart * tensor.element_size()) % _BYTES == 0


def aligned_rows(tensor: Tensor, name: str) -> Tensor:
    """`tensor` [M, K], or a copy of it if a row of it starts between two multiples of 16 bytes."""
    if is_aligned(tensor):
        return tensor
    warn_once(
        f"{name} is copied in every call, because its rows do not start at multiples of {_BYTES} bytes; allocate it so "
        "to avoid the copy"
    )
    return tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()
