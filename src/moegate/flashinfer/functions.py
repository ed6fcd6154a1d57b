"""FlashInfer's functions, found, tried out, and bound to what never changes."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from moegate.cuda.device import is_aligned
from moegate.flashinfer.limits import TINYGEMM, Function, missing
from moegate.machine import Machine
from moegate.spec import RouterSpec
from moegate.warn import warn_once

_failures: dict[tuple[str, torch.device], str] = {}


def unsupported(function: Function, machine: Machine) -> str | None:
    """None, or why FlashInfer cannot run one of its functions on a machine."""
    if machine.capability is None:
        return f"{machine.name} is no NVIDIA GPU"
    reason = missing(function, machine.capability, machine.flashinfer) or machine.no_nvcc
    if reason is None and machine.device is not None:
        reason = _failures.get((function.name, machine.device))
    return reason


def try_out(function: Function, device: torch.device, run_once: Callable[[], object]) -> str | None:
    """None, or why a function cannot run here: imports FlashInfer, asks it, compiles, and runs a token.

    A function that failed is not tried again in this process: `unsupported` has the reason.
    """
    if (function.name, device) not in _failures:
        try:
            run_once()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # an import and a compilation of a large package fail in many ways
            message = " ".join(str(error).split())[:300]
            _failures[function.name, device] = f"{function.name} failed: {type(error).__name__}: {message}"
    return _failures.get((function.name, device))


def forget_failures() -> None:
    """Has every function tried out anew."""
    _failures.clear()


def _find(function: Function, device: torch.device) -> Callable[..., Any]:
    """The function, after FlashInfer was asked whether it has code for the device.

    Raises:
        RuntimeError: It has none. Whatever importing FlashInfer raises passes through.
    """
    found: Any = getattr(import_module(function.module), function.name)
    asked = getattr(found, "is_compute_capability_supported", None)
    if asked is not None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if not asked(10 * major + minor):
            raise RuntimeError(f"FlashInfer says that it does not support sm_{10 * major + minor}")
    return found  # type: ignore[no-any-return]


def bound_gemm(
    function: Function, device: torch.device, spec: RouterSpec, *, pdl: bool
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(hidden [M, K], weight [N, K], linear bias [N] or None) -> logits [M, N], by one of FlashInfer's GEMMs.

    Raises:
        Exception: Whatever importing FlashInfer raises; a RuntimeError if it has no code for the device.
    """
    found, rows = _find(function, device), spec.num_gate_rows
    if function is TINYGEMM:

        def tinygemm(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out = torch.empty((hidden.shape[0], rows), dtype=torch.bfloat16, device=hidden.device)
            # Early start stays off: it hangs unless every kernel before it has it, which nobody here knows.
            found(hidden, weight, out, bias)
            return out

        return tinygemm

    def gemm(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty((hidden.shape[0], rows), dtype=torch.float32, device=hidden.device)
        found(hidden, weight.t(), out, launch_with_pdl=pdl)
        return out

    return gemm


def bound_top_k(
    function: Function, device: torch.device, spec: RouterSpec, *, pdl: bool
) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """(float32 logits [M, N], correction bias [N]) -> ids int32 and weights float32 [M, k], by FlashInfer's top-k.

    Raises:
        Exception: See `bound_gemm`.
    """
    found = _find(function, device)
    groups, kept, k, scale = spec.n_group, spec.topk_group, spec.top_k, spec.routed_scaling_factor

    def top_k(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        values = torch.empty((logits.shape[0], k), dtype=torch.float32, device=logits.device)
        ids = torch.empty((logits.shape[0], k), dtype=torch.int32, device=logits.device)
        # Its check refuses every k > 1 without groups, which its kernel takes; limits.py has the rest of the check.
        found(logits, bias, groups, kept, k, scale, values, ids, launch_with_pdl=pdl, skip_check=True)
        return ids, values

    return top_k


def dense(tensor: Tensor, name: str) -> Tensor:
    """`tensor` [M, K], or a copy: FlashInfer's GEMMs read dense rows from an address that is a multiple of 16."""
    if tensor.is_contiguous() and is_aligned(tensor):
        return tensor
    warn_once(
        f"{name} is copied in every call, because FlashInfer takes neither rows that are apart nor rows between two "
        "multiples of 16 bytes; allocate it dense to avoid the copy"
    )
    return tensor.clone(memory_format=torch.contiguous_format)
