"""The GPU as the launches see it: its limits, the current device and stream, and memory.

Every private function of PyTorch that the hot path of a GPU calls is named here, with what takes its place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moegate.cuda import jit
from moegate.machine import Machine
from moegate.warn import warn_once

try:  # what the code that torch.compile generates allocates with
    from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
except ImportError:
    _empty_strided_cuda = None

# Of a PyTorch that was built without CUDA neither exists, and neither is called. No object is made of the stream.
current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)

_OLDEST = (8, 0)
_ALIGNED_BYTES = 16


def unsupported(machine: Machine) -> str | None:
    """None, or why the kernels cannot run on a machine."""
    if machine.capability is None:
        return f"{machine.name} is no NVIDIA GPU"
    if machine.capability < _OLDEST:
        return f"compute capability {'.'.join(map(str, machine.capability))} is below {'.'.join(map(str, _OLDEST))}"
    return machine.no_nvrtc


@dataclass(frozen=True)
class Chip:
    """What a tiling needs to know of a GPU."""

    num_sms: int
    has_clusters: bool
    shared_bytes: int
    """The most that a block can have of shared memory."""


# The most that a block can have, where that is not 227 KiB: CUDA C++ Programming Guide, table of compute capabilities.
_SHARED_KIB = {(8, 0): 163, (8, 6): 99, (8, 7): 163, (8, 9): 99, (12, 0): 99, (12, 1): 99}


def described_chip(capability: tuple[int, int], num_sms: int) -> Chip:
    """A chip that is not here."""
    has_clusters = jit.has_clusters_and_pdl(f"sm_{capability[0]}{capability[1]}")
    return Chip(num_sms, has_clusters, _SHARED_KIB.get(capability, 227) << 10)


@cache
def chip_of(device: torch.device, arch: str | None = None) -> Chip:
    """The chip that kernels for `arch`, the device's own by default, are tiled for."""
    arch = arch or jit.arch_of(torch.cuda.get_device_capability(device))
    found = torch.cuda.get_device_properties(device)
    shared_bytes_of_block: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined] # its stub lacks it
    return Chip(found.multi_processor_count, jit.has_clusters_and_pdl(arch), shared_bytes_of_block)


def empty_rows(num_rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor [M, N] on the current device; nothing is written to it.

    A call makes three of them, and `torch.empty` costs the host as much as a launch.
    """
    if _empty_strided_cuda is None:
        return torch.empty((num_rows, columns), dtype=dtype, device="cuda")
    return _empty_strided_cuda((num_rows, columns), (columns, 1), dtype)  # type: ignore[no-any-return]


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The same of any shape [M] or [M, N]."""
    return empty_rows(shape[0], math.prod(shape[1:]), dtype).view(shape)


def are_surely_aligned(addresses: int, strides: int) -> bool:
    """True only if `is_aligned` is, of tensors whose addresses and whose strides, in elements, are given as one (by |).

    Every call asks this of its two tensors, and it is the quicker question.
    """
    return addresses % _ALIGNED_BYTES == 0 and strides % _ALIGNED_BYTES == 0


def is_aligned(tensor: Tensor) -> bool:
    """True if every row of `tensor` [M, K] starts at a multiple of 16 bytes."""
    rows_apart = tensor.stride(0) if tensor.shape[0] > 1 else 0
    return (tensor.data_ptr() | rows_apart * tensor.element_size()) % _ALIGNED_BYTES == 0


def aligned_rows(tensor: Tensor, name: str) -> Tensor:
    """`tensor` [M, K], or a copy of it if a row of it starts between two multiples of 16 bytes."""
    if is_aligned(tensor):
        return tensor
    warn_once(
        f"{name} is copied in every call, because its rows do not start at multiples of {_ALIGNED_BYTES} bytes; "
        "allocate it so to avoid the copy"
    )
    return tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()


def address_of(tensor: Tensor | None) -> int:
    """A tensor's address for a kernel; 0: there is no such tensor."""
    return 0 if tensor is None else tensor.data_ptr()
