"""`RoutedLogits`: logits that bring their routing along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moegate.routing import Routing

# What reads neither the values nor the memory of a tensor.
_HARMLESS = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.size,
    Tensor.dim,
}


class RoutedLogits(Tensor):
    """The logits of one call of a gate, together with the routing that the same call computed from them.

    vLLM's runner passes the logits of a gate on to the selection. The routing takes the same way, on the tensor itself,
    so that it cannot meet the logits of another call. Anything done to the tensor on the way takes the routing away,
    and gives plain tensors: a slice, a copy, an all-gather, a write in place, a look at the tensor's address.
    """

    routing: Routing | None
    """Without the logits; None: something was done with the tensor."""

    @staticmethod
    def of(routing: Routing) -> RoutedLogits:
        """The logits of a routing, in the same memory."""
        assert routing.logits is not None
        logits = routing.logits.as_subclass(RoutedLogits)
        logits.routing = routing.without_logits()
        return logits

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs any function of PyTorch on plain tensors."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _HARMLESS:
                return func(*args, **(kwargs or {}))
            args, kwargs = pytree.tree_map_only(RoutedLogits, _without_routing, (args, kwargs or {}))
            return func(*args, **kwargs)


def plain(logits: Tensor) -> Tensor:
    """The same logits as a tensor of no other class."""
    return _without_routing(logits) if isinstance(logits, RoutedLogits) else logits


def _without_routing(logits: RoutedLogits) -> Tensor:
    logits.routing = None
    with torch._C.DisableTorchFunctionSubclass():
        return logits.as_subclass(Tensor)
