"""Routes with a product and a top-k of FlashInfer, or with one of them and the other of ours."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moegate.backends.base import Backend
from moegate.backends.cuda.alignment import is_aligned
from moegate.backends.flashinfer.limits import TINYGEMM, Function
from moegate.backends.torch import gemm as torch_gemm
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec
from moegate.warn import warn_once

_failures: dict[tuple[str, torch.device], str] = {}


def known_failure(function: Function, device: torch.device) -> str | None:
    """What went wrong when the function was tried on the device; None: nothing, or it was not tried."""
    return _failures.get((function.name, device))


class _Prepared(NamedTuple):
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] | None
    top_k: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]] | None


class FlashInferRouter:
    """Runs the functions that it is made of; which specs, dtypes and numbers of tokens they take, limits.py says.

    Args:
        product: Writes the logits; None: cuBLAS does.
        top_k: Chooses; None: the selection of `own` does.
        own: The backend that has the rest.
    """

    name = "flashinfer"

    def __init__(self, product: Function | None, top_k: Function | None, own: Backend) -> None:
        assert product is not None or top_k is not None
        self._product, self._top_k, self._own = product, top_k, own

    def try_out(self, spec: RouterSpec, device: torch.device) -> str | None:
        """None, or why it cannot run here: imports FlashInfer, asks it, compiles, and runs each function on a token.

        A function that failed is not tried again in this process: `known_failure` has the reason.
        """
        functions = [function for function in (self._product, self._top_k) if function is not None]
        for function in functions:
            if (function.name, device) not in _failures:
                try:
                    self._run_once(function, spec, device)
                except Exception as error:  # an import and a compilation of a large package fail in many ways
                    message = " ".join(str(error).split())[:300]
                    _failures[function.name, device] = f"{function.name} failed: {type(error).__name__}: {message}"
            if (function.name, device) in _failures:
                return _failures[function.name, device]
        return None

    def _run_once(self, function: Function, spec: RouterSpec, device: torch.device) -> None:
        rows = spec.num_gate_rows
        if function is self._product:
            weight, hidden = (torch.zeros((m, spec.hidden_size), device=device).bfloat16() for m in (rows, 1))
            bias = torch.zeros(rows, dtype=torch.bfloat16, device=device) if spec.linear_bias else None
            bound_product(function, device, spec, pdl=True)(hidden, weight, bias)
        else:
            correction = torch.zeros(spec.num_selectable, device=device)
            bound_top_k(function, device, spec, pdl=True)(torch.zeros((1, rows), device=device), correction)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def prepare(
        self, weight: Tensor, spec: RouterSpec, tensors: RouterTensors, *, frozen: bool, pdl: bool
    ) -> _Prepared:
        """FlashInfer's functions, found and bound to what never changes."""
        device = weight.device
        product = None if self._product is None else bound_product(self._product, device, spec, pdl=pdl)
        return _Prepared(product, None if self._top_k is None else bound_top_k(self._top_k, device, spec, pdl=pdl))

    def route(
        self,
        hidden: Tensor,
        weight: Tensor,
        spec: RouterSpec,
        tensors: RouterTensors,
        input_ids: Tensor | None,
        prepared: object | None,
        out: Routing | None = None,
    ) -> Routing:
        """See `moegate.route`; `prepared` is of `prepare`."""
        prepared = prepared or self.prepare(weight, spec, tensors, frozen=False, pdl=True)
        assert isinstance(prepared, _Prepared)
        if not hidden.shape[0]:
            return self._own.route(hidden, weight, spec, tensors, input_ids, None, out)
        # What needs a gradient cannot be handed over.
        hidden, weight, tensors = hidden.detach(), weight.detach(), tensors.detach()
        with torch.cuda.device_of(hidden):
            if prepared.product is None:
                logits = torch_gemm.logits(hidden, weight, spec, tensors, None)
            else:
                logits = prepared.product(_dense(hidden, "hidden"), _dense(weight, "weight"), tensors.bias)
            if prepared.top_k is None:
                return self._own.select(logits, spec, tensors, input_ids).into(out)
            ids, weights = prepared.top_k(logits, tensors.e_score_correction_bias)
        return Routing(ids, weights, logits).into(out)


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


def bound_product(
    function: Function, device: torch.device, spec: RouterSpec, *, pdl: bool
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(hidden [M, K], weight [N, K], linear bias [N] or None) -> logits [M, N], by one of FlashInfer's products.

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
        Exception: See `bound_product`.
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


def _dense(tensor: Tensor, name: str) -> Tensor:
    """`tensor` [M, K], or a copy: FlashInfer's products take rows that follow each other, from a multiple of 16."""
    if tensor.is_contiguous() and is_aligned(tensor):
        return tensor
    warn_once(
        f"{name} is copied in every call, because FlashInfer takes neither rows that are apart nor rows between two "
        "multiples of 16 bytes; allocate it dense to avoid the copy"
    )
    return tensor.clone(memory_format=torch.contiguous_format)
