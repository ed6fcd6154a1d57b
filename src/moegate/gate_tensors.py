"""A module with the tensors of a gate, under the names of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moegate.routing import FLOATS, RouterTensors
from moegate.spec import RouterSpec

if TYPE_CHECKING:
    from typing_extensions import Self

_BUFFERS = frozenset({"e_score_correction_bias", "tid2eid"})
_HALF = (torch.bfloat16, torch.float16)


class GateTensors(nn.Module):
    """Holds the given tensors themselves, and keeps those in float32 that are pinned to it."""

    spec: RouterSpec

    def _register(self, tensors: RouterTensors, *names: str) -> None:
        """Registers the tensors of these names."""
        for name in names:
            tensor = getattr(tensors, name)
            if name in _BUFFERS:
                self.register_buffer(name, tensor)
            else:
                self.register_parameter(name, as_parameter(tensor))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts like any module, except for casts of tensors that are pinned to float32."""
        pinned = ["e_score_correction_bias"] + ["weight"] * (self.spec.weight_dtype == "float32")
        before = {name: tensor.detach() for name in pinned if (tensor := getattr(self, name, None)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype != torch.float32:
                now.data = tensor.to(now.device)
        return self


def as_parameter(tensor: Tensor | None) -> nn.Parameter | None:
    """A parameter with the tensor's memory; a parameter is returned as it is."""
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=tensor.requires_grad)


def given_correction_bias(value: Tensor | None) -> Tensor | None:
    """A constructor's correction bias as the module holds it: in float32, without a gradient; else for the checks."""
    return value.detach().float() if isinstance(value, Tensor) and value.dtype in FLOATS else value


def widen_correction_bias(gate: nn.Module) -> None:
    """Replaces a gate's correction bias in half precision by a float32 copy."""
    name = "e_score_correction_bias"
    bias = getattr(gate, name, None)
    if not isinstance(bias, Tensor) or bias.dtype not in _HALF:
        return
    wide: Tensor = bias.detach().float()
    if isinstance(bias, nn.Parameter):
        wide = nn.Parameter(wide, requires_grad=bias.requires_grad)
    holders: tuple[dict[str, Any], ...] = (gate._parameters, gate._buffers, gate.__dict__)
    for holder in holders:
        if name in holder:
            holder[name] = wide
