"""The `torch` backend: PyTorch ops, on the CPU and on every device that PyTorch has."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.backends.torch import gemm
from moegate.backends.torch.prepared import PreparedWeight, prepare
from moegate.backends.torch.selection import select
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec


class TorchBackend:
    """Runs everything, everywhere; the others are faster where they run."""

    name = "torch"

    def unsupported(self, device: torch.device, spec: RouterSpec | None = None) -> str | None:
        """None: PyTorch's ops run on all its devices."""
        return None

    def prepare(
        self, weight: Tensor, spec: RouterSpec, tensors: RouterTensors, *, frozen: bool, pdl: bool
    ) -> PreparedWeight | None:
        """On a CPU, a frozen weight in the layouts of its products."""
        if not frozen:
            return None
        dtype = gemm.product_dtype(weight.dtype, weight.dtype, getattr(torch, spec.logits_dtype))
        if spec.input_norm_eps is not None or (tensors.bias is not None and tensors.bias.dtype != dtype):
            dtype = torch.float32
        return prepare(weight, dtype)

    def router_gemm(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See `moegate.router_gemm`."""
        return gemm.router_gemm(hidden, weight, bias, out_dtype)

    def select(self, logits: Tensor, spec: RouterSpec, tensors: RouterTensors, input_ids: Tensor | None) -> Routing:
        """See `moegate.select`."""
        return select(logits, spec, tensors, input_ids)

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
        """See `moegate.route`."""
        assert prepared is None or isinstance(prepared, PreparedWeight)
        return select(gemm.logits(hidden, weight, spec, tensors, prepared), spec, tensors, input_ids).into(out)
