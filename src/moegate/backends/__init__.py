"""The backends, best first, and the choice among them."""

from __future__ import annotations

from functools import cache

import torch

from moegate.backends.base import Backend
from moegate.backends.cuda import CudaBackend
from moegate.backends.torch import TorchBackend
from moegate.spec import RouterSpec
from moegate.warn import warn_once

BACKENDS: tuple[Backend, ...] = (CudaBackend(), TorchBackend())


@cache
def choose(device: torch.device, spec: RouterSpec | None = None) -> Backend:
    """The first backend that runs on the device, and runs the spec there."""
    for backend in BACKENDS:
        reason = backend.unsupported(device, spec)
        if reason is None:
            return backend
        if device.type == "cuda":
            warn_once(f"the {backend.name} backend cannot run on {device}: {reason}. A slower one takes its place.")
    raise AssertionError("the torch backend runs everything")
