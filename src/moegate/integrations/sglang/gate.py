"""The gate of the DeepSeek family: `MoEGate.forward` by moegate's GEMM, and with its selection where one is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils import use_intel_amx_backend
from torch import Tensor, nn

from moegate import Gate, GateLinear
from moegate.integrations.engines import logits_dtype
from moegate.integrations.sglang import in_place
from moegate.integrations.sglang.selection import Selection
from moegate.integrations.sglang.tickets import Ticket, attach
from moegate.routing import FLOATS


class GateOfLayer:
    """The kernels for one `MoEGate`.

    The first call computes logits alone. The selection that takes them makes itself known; from then on one call of
    a `moegate.Gate` yields the logits and the routing.

    Args:
        weight: The gate's parameter, [num_experts, K].
        is_taken: False: SGLang goes on to compute this gate.
    """

    def __init__(self, weight: Tensor, *, is_taken: bool) -> None:
        self.weight, self.is_taken = weight, is_taken
        if not is_taken:
            return
        dtype = logits_dtype("float32" if weight.is_cuda or weight.dtype == torch.float32 else "bfloat16")
        # Not frozen, so that each call reads the weight itself: SGLang reloads and updates weights through `.data`,
        # which nobody can notice.
        with torch.inference_mode(False):
            self._linear = GateLinear(weight, out_dtype=getattr(torch, dtype), frozen=False)
        self._selection: Selection | None = None
        self._gate: Gate | None = None

    def serve(self, selection: Selection) -> None:
        """From the next call on, routes for the selection, which has just been given logits of this gate."""
        is_free = self._selection is None or not self._selection.is_current
        if not is_free or _is_capturing(self.weight):
            return
        spec = replace(selection.spec, hidden_size=self.weight.shape[1], logits_dtype=self._linear.spec.logits_dtype)
        with torch.inference_mode(False):
            self._gate = Gate(spec, self.weight, e_score_correction_bias=selection.bias, frozen=False)
        self._selection = selection

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The logits [M, num_experts], with a ticket."""
        # Not in inference mode, so that PyTorch counts what is written to the logits (tickets.py).
        with torch.inference_mode(False), torch.no_grad():
            if self._gate is None:
                logits: Tensor = self._linear(hidden_states)
                attach(Ticket(self, logits._version), logits)
            else:
                routing = self._gate(hidden_states, return_logits=True)
                assert routing.logits is not None
                logits = routing.logits
                attach(Ticket(self, logits._version, self._selection, routing.without_logits()), logits)
        return logits


_gates: WeakKeyDictionary[nn.Module, GateOfLayer] = WeakKeyDictionary()


def forward(
    original: Callable[..., Tensor], gate: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """`MoEGate.forward`, as a hook around it."""
    # A compiled graph knows no tickets, and SGLang's own operators compile.
    if torch.compiler.is_compiling() or (found := _of(gate, hidden_states)) is None:
        return original(gate, hidden_states, *args, **kwargs)
    return found.logits(hidden_states)


def _of(gate: nn.Module, hidden_states: Tensor) -> GateOfLayer | None:
    weight: Tensor = gate.weight  # type: ignore[assignment]
    found = _gates.get(gate)
    if found is None or found.weight is not weight:
        if _is_capturing(weight):
            return None  # what is built compiles, which a CUDA graph cannot record
        in_place.check()
        found = _gates[gate] = GateOfLayer(weight, is_taken=_is_taken(gate, weight))
    fits = hidden_states.dim() == 2 and hidden_states.dtype in FLOATS and hidden_states.device == weight.device
    return found if fits and found.is_taken else None


def _is_taken(gate: nn.Module, weight: Tensor) -> bool:
    """True for a plain weight on a CUDA device or a CPU, outside of deterministic inference."""
    if torch.version.hip is not None or weight.device.type not in ("cuda", "cpu"):
        return False
    if get_exec().deterministic.enable_deterministic_inference or use_intel_amx_backend(gate):
        return False
    return weight.dtype in (FLOATS if weight.is_cuda else (torch.float32, torch.bfloat16))


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()
