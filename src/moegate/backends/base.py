"""The interface of a backend: one way to compute what docs/contract.md defines."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec


class Router(Protocol):
    """What a gate runs. Arguments arrive checked; every method runs without autograd."""

    @property
    def name(self) -> str:
        """What users call it."""
        ...

    def prepare(
        self, weight: Tensor, spec: RouterSpec, tensors: RouterTensors, *, frozen: bool, pdl: bool
    ) -> object | None:
        """What pays to be made once for a gate, for its calls of `route`; None: nothing.

        `frozen` says that the tensors' values will not change without another call of this, `pdl` that
        kernels may start before the kernel in front of them ends.
        """
        ...

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
        """Hidden states [M, K] -> routing, with its logits where they exist as a tensor; in `out`, if that is given."""
        ...


class Backend(Router, Protocol):
    """One that keeps the contract, on the devices and for the specs that it supports."""

    def unsupported(self, device: torch.device, spec: RouterSpec | None = None) -> str | None:
        """None, or the reason why this backend cannot run on the device, or cannot run the spec there."""
        ...

    def router_gemm(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """[M, K] x [R, K] (+ [R]) -> [M, R]."""
        ...

    def select(self, logits: Tensor, spec: RouterSpec, tensors: RouterTensors, input_ids: Tensor | None) -> Routing:
        """Logits [M, R] -> routing."""
        ...
