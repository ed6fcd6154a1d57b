"""The `cuda` backend: kernels compiled at run time for the GPU, the shape and the spec at hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from moegate.backends.cuda import gemm, jit, product, selection
from moegate.backends.cuda.alignment import is_aligned
from moegate.backends.cuda.memory import empty
from moegate.backends.cuda.router import CudaRouter, TensorDtypes
from moegate.backends.cuda.sources import GemmDtypes
from moegate.backends.cuda.tiling import MAX_DECODE_TOKENS
from moegate.backends.torch import gemm as torch_gemm
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec

_OLDEST = (8, 0)


def unsupported_capability(capability: tuple[int, int]) -> str | None:
    """None, or why the kernels cannot run on a GPU of this compute capability."""
    if capability < _OLDEST:
        return f"compute capability {'.'.join(map(str, capability))} is below {'.'.join(map(str, _OLDEST))}"
    return None


@dataclass(frozen=True)
class CudaBackend:
    """Runs every spec on NVIDIA GPUs from compute capability 8.0 on."""

    gemm_tokens: int = MAX_DECODE_TOKENS
    """`route` takes the logits of up to so many tokens from router_gemm, those of more from cuBLAS."""
    name: ClassVar[str] = "cuda"

    def unsupported(self, device: torch.device, spec: RouterSpec | None = None) -> str | None:
        """None, or what is missing: the GPU, or the compiler."""
        if device.type == "cuda" and torch.version.hip is not None:
            return f"{device} is an AMD GPU, and the kernels are for NVIDIA's"
        if device.type != "cuda" or torch.version.cuda is None:
            return f"{device} is no NVIDIA GPU"
        return unsupported_capability(torch.cuda.get_device_capability(device)) or jit.missing_compiler()

    def prepare(
        self, weight: Tensor, spec: RouterSpec, tensors: RouterTensors, *, frozen: bool, pdl: bool
    ) -> CudaRouter:
        """The kernels for this gate, compiled for what its model most likely sends; others are when they come."""
        # A copy that each call makes is the predecessor's output, which a frozen gate would load too early.
        frozen = frozen and is_aligned(weight)
        router = self._router(spec, weight, tensors, frozen=frozen, pdl=pdl)
        hidden = weight.dtype if weight.dtype != torch.float32 else torch.bfloat16
        router.warmup(hidden, torch.int64 if spec.hash_routing else None)
        return router

    def router_gemm(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
        """See `moegate.router_gemm`."""
        num_tokens, hidden_size = hidden.shape
        is_many, rows = num_tokens > MAX_DECODE_TOKENS, weight.shape[0]
        refused = product.unsupported(hidden.dtype, weight.dtype, hidden_size, has_norm=False) if is_many else None
        gemm.warn_if_unsupported(hidden_size)
        if refused is not None:
            product.warn_of_plain_product(refused)
        if gemm.unsupported(hidden_size) or refused is not None:
            return torch_gemm.router_gemm(hidden, weight, bias, out_dtype)
        device = hidden.device
        with torch.cuda.device(device):
            if is_many:
                return product.logits(hidden, weight, bias, out_dtype)
            logits = empty((num_tokens, rows), out_dtype)
            if num_tokens > 0:
                dtypes = GemmDtypes(hidden.dtype, weight.dtype, None if bias is None else bias.dtype, None, out_dtype)
                kernels = gemm.gemm_kernels(hidden_size, rows, dtypes, None, device, frozen=False, pdl=True)
                stream = torch.cuda.current_stream().cuda_stream
                kernels.launch(hidden, weight, bias, None, logits, num_tokens, stream)
        return logits

    def select(self, logits: Tensor, spec: RouterSpec, tensors: RouterTensors, input_ids: Tensor | None) -> Routing:
        """See `moegate.select`."""
        dtypes = selection.select_dtypes(logits.dtype, tensors, None if input_ids is None else input_ids.dtype)
        with torch.cuda.device(logits.device):
            kernels = selection.select_kernels(
                spec,
                dtypes,
                logits.device,
                aligned=selection.can_read_four(logits, tensors.e_score_correction_bias),
                frozen=False,
                pdl=True,
            )
            num_tokens = logits.shape[0]
            routing = kernels.outputs(logits, num_tokens)
            if num_tokens:
                kernels.launch(routing, tensors, input_ids, num_tokens, torch.cuda.current_stream().cuda_stream)
        return routing

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
        if prepared is None:
            # Nothing is known of who else writes to the tensors of a call without a gate: not frozen.
            prepared = self._router(spec, weight, tensors, frozen=False, pdl=True)
        assert isinstance(prepared, CudaRouter)
        return prepared.route(hidden, weight, tensors, input_ids, out)

    def _router(
        self, spec: RouterSpec, weight: Tensor, tensors: RouterTensors, *, frozen: bool, pdl: bool
    ) -> CudaRouter:
        """One for all gates that are alike, since it holds no tensor."""
        dtypes = TensorDtypes.of(tensors)
        return _one_router(
            spec, weight.dtype, dtypes, weight.device, frozen=frozen, pdl=pdl, gemm_tokens=self.gemm_tokens
        )


_one_router = cache(CudaRouter)
