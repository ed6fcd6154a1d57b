"""The `torch` backend: PyTorch ops, on the CPU and on every device that PyTorch has."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.backends.torch import gemm
from moegate.backends.torch.pieces import are_many, in_pieces
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
        return prepare(weight, _product_dtype(weight.dtype, weight, spec, tensors))

    def router_gemm(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See `moegate.router_gemm`."""
        if not are_many(hidden):
            return gemm.router_gemm(hidden, weight, bias, out_dtype)
        dtype = gemm.dtype_of_product(hidden.dtype, weight, bias, out_dtype)
        weight = weight.to(dtype)  # once, and not for each piece

        def compute(rows: slice) -> Tensor:
            return gemm.router_gemm(hidden[rows], weight, bias, out_dtype)

        return in_pieces(len(hidden), len(weight), compute, copied=_copied(hidden, dtype))

    def select(self, logits: Tensor, spec: RouterSpec, tensors: RouterTensors, input_ids: Tensor | None) -> Routing:
        """See `moegate.select`."""
        if not are_many(logits):
            return select(logits, spec, tensors, input_ids)

        def compute(rows: slice) -> Routing:
            ids = None if input_ids is None else input_ids[rows]
            return select(logits[rows], spec, tensors, ids).without_logits()

        return in_pieces(len(logits), spec.num_gate_rows, compute)._replace(logits=logits)

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
        if not are_many(hidden):
            return _route(hidden, weight, spec, tensors, input_ids, prepared).into(out)
        dtype = _product_dtype(hidden.dtype, weight, spec, tensors)
        if prepared is None or prepared.dtype != dtype:
            weight = weight.to(dtype)
        copied = _copied(hidden, dtype) if spec.input_norm_eps is None else spec.hidden_size

        def compute(rows: slice) -> Routing:
            ids = None if input_ids is None else input_ids[rows]
            return _route(hidden[rows], weight, spec, tensors, ids, prepared)

        return in_pieces(len(hidden), spec.num_gate_rows, compute, copied=copied).into(out)


def _copied(hidden: Tensor, dtype: torch.dtype) -> int:
    """How many numbers of a row are copied for a product in a dtype."""
    return 0 if hidden.dtype == dtype else hidden.shape[1]


def _product_dtype(hidden: torch.dtype, weight: Tensor, spec: RouterSpec, tensors: RouterTensors) -> torch.dtype:
    """Of a CPU's product of hidden states in a dtype, which an input norm makes float32."""
    hidden = hidden if spec.input_norm_eps is None else torch.float32
    return gemm.dtype_of_product(hidden, weight, tensors.bias, getattr(torch, spec.logits_dtype))


def _route(
    hidden: Tensor,
    weight: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    input_ids: Tensor | None,
    prepared: PreparedWeight | None,
) -> Routing:
    return select(gemm.logits(hidden, weight, spec, tensors, prepared), spec, tensors, input_ids)
