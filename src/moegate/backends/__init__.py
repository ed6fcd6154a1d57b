"""The backends, best first, and the choice among them."""

from __future__ import annotations

from functools import cache

import torch

from moegate.backends.base import Backend
from moegate.backends.torch import TorchBackend
from moegate.spec import RouterSpec

BACKENDS: tuple[Backend, ...] = (TorchBackend(),)


@cache
def choose(device: torch.device, spec: RouterSpec | None = None) -> Backend:
    """The first backend that runs on the device, and runs the spec there."""
    return next(backend for backend in BACKENDS if backend.unsupported(device, spec) is None)
