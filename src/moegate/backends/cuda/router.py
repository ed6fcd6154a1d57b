"""The chain of one gate: router GEMM, then selection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moegate.backends.cuda import gemm, selection, split
from moegate.backends.cuda.memory import empty
from moegate.backends.cuda.sources import GemmDtypes, SelectDtypes
from moegate.backends.cuda.tiling import MAX_DECODE_TOKENS, TOKENS_OF_TILE
from moegate.backends.torch import gemm as torch_gemm
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec


class TensorDtypes(NamedTuple):
    """The dtypes of a gate's small tensors, as far as kernels are compiled for them; None: there is no such tensor."""

    bias: torch.dtype | None
    input_scale: torch.dtype | None
    per_expert_scale: torch.dtype | None
    global_scale: torch.dtype | None
    tid2eid: torch.dtype | None

    @classmethod
    def of(cls, tensors: RouterTensors) -> TensorDtypes:
        """The dtypes of these tensors."""
        given = (getattr(tensors, name) for name in cls._fields)
        return cls(*(None if tensor is None else tensor.dtype for tensor in given))


class _Selections(NamedTuple):
    """The selection's kernels for one set of dtypes."""

    of_logits: selection.SelectKernels
    of_products: selection.SelectKernels | None
    """Make the logits of cuBLAS's products; None: one product is the logit."""


class CudaRouter:
    """The kernels for one spec and the dtypes of one gate's tensors. It holds no tensor: each call brings its own.

    Up to `gemm_tokens` tokens (64 with float32 hidden states) the logits come from the kernel here, beyond from
    cuBLAS; the selection is always the kernel here.
    """

    def __init__(
        self,
        spec: RouterSpec,
        weight: torch.dtype,
        dtypes: TensorDtypes,
        device: torch.device,
        *,
        frozen: bool,
        pdl: bool,
        gemm_tokens: int,
    ) -> None:
        self._spec, self._device = spec, device
        self._index = device.index or 0
        self._weight_dtype = weight
        self._dtypes = dtypes
        self._frozen, self._pdl = frozen, pdl
        self._gemm_tokens = gemm_tokens
        self._logits_dtype: torch.dtype = getattr(torch, spec.logits_dtype)
        self._has_gemm = gemm.unsupported(spec.hidden_size) is None
        gemm.warn_if_unsupported(spec.hidden_size)
        self._gemm_by_dtype: dict[torch.dtype, gemm.GemmKernels] = {}
        self._split_by_dtype: dict[torch.dtype, split.SplitKernels] = {}
        self._select_by_inputs: dict[tuple[torch.dtype | None, bool], _Selections] = {}

    def warmup(self, hidden: torch.dtype, input_ids: torch.dtype | None, *, aligned: bool = True) -> None:
        """Compiles what calls with these dtypes run."""
        if self._has_gemm and hidden not in self._gemm_by_dtype:
            dtypes = GemmDtypes(
                hidden, self._weight_dtype, self._dtypes.bias, self._dtypes.input_scale, self._logits_dtype
            )
            spec = self._spec
            size = spec.hidden_size, spec.num_gate_rows
            if split.unsupported(hidden, self._weight_dtype, spec.input_norm_eps) is None:
                self._split_by_dtype[hidden] = split.split_kernels(
                    *size, self._dtypes.bias, self._logits_dtype, self._device, pdl=self._pdl
                )
            # Last, since calls take it as the sign that all is there.
            self._gemm_by_dtype[hidden] = gemm.gemm_kernels(
                *size, dtypes, spec.input_norm_eps, self._device, frozen=self._frozen, pdl=self._pdl
            )
        if (input_ids, aligned) not in self._select_by_inputs:
            own, products = self._dtypes, self._products_of_logit()

            def kernels(products: int, bias: torch.dtype | None) -> selection.SelectKernels:
                dtypes = SelectDtypes(
                    self._logits_dtype, own.per_expert_scale, own.global_scale, own.tid2eid, input_ids, bias
                )
                places = {"aligned": aligned, "frozen": self._frozen, "pdl": self._pdl}
                return selection.select_kernels(self._spec, dtypes, self._device, products=products, **places)

            self._select_by_inputs[input_ids, aligned] = _Selections(
                kernels(0, None), kernels(products, own.bias) if products else None
            )

    def _products_of_logit(self) -> int:
        """Of how many of cuBLAS's products the selection makes a logit; 0: it is given the logits."""
        if self._spec.input_norm_eps is not None:
            return 0
        if self._weight_dtype == torch.float32:
            return 3 if self._has_gemm else 0
        return 1 if self._logits_dtype != torch.float32 or self._dtypes.bias is not None else 0

    def route(
        self,
        hidden: Tensor,
        weight: Tensor,
        tensors: RouterTensors,
        input_ids: Tensor | None,
        out: Routing | None = None,
    ) -> Routing:
        """[M, K] -> the routing, with its logits, in `out` if that is given; see `moegate.route`."""
        if torch.cuda.current_device() != self._index:
            with torch.cuda.device(self._index):
                return self.route(hidden, weight, tensors, input_ids, out)
        ids_dtype = None if input_ids is None else input_ids.dtype
        bias, logits = tensors.e_score_correction_bias, None if out is None else out.logits
        # New logits are aligned; the caller's may not be.
        places = (0 if bias is None else bias.data_ptr()) | (0 if logits is None else logits.data_ptr())
        aligned = places % 16 == 0
        select = self._select_by_inputs.get((ids_dtype, aligned))
        gemm_kernels = self._gemm_by_dtype.get(hidden.dtype)
        if select is None or (gemm_kernels is None and self._has_gemm):
            self.warmup(hidden.dtype, ids_dtype, aligned=aligned)
            return self.route(hidden, weight, tensors, input_ids, out)

        num_tokens = hidden.shape[0]
        stream = torch._C._cuda_getCurrentRawStream(self._index)  # no object is made of it
        # `gemm_tokens` is of hidden states with 16 bits: of others no times are known (choice/costs.py).
        most = self._gemm_tokens if hidden.dtype != torch.float32 else MAX_DECODE_TOKENS
        if num_tokens > 0 and (gemm_kernels is None or num_tokens > most):
            return self._route_many(hidden, weight, tensors, input_ids, out, select, stream)
        if logits is None:
            logits = empty((num_tokens, self._spec.num_gate_rows), self._logits_dtype)
        routing = select.of_logits.outputs(logits, out)
        if num_tokens == 0:
            return routing
        assert gemm_kernels is not None
        self._check_dtype(weight)
        gemm_kernels.launch(hidden, weight, tensors.bias, tensors.input_scale, logits, stream)
        # Behind a short product the next layer's kernels wait for the logits: what they load early would be in the way
        # of these, or not, as the chip happens to place their blocks.
        is_short = num_tokens <= TOKENS_OF_TILE
        select.of_logits.launch(routing, tensors, input_ids, stream, holds_dependents=is_short)
        return routing

    def _check_dtype(self, weight: Tensor) -> None:
        assert weight.dtype == self._weight_dtype, "Gate.refresh() was not called after a change of dtype"

    def _route_many(
        self,
        hidden: Tensor,
        weight: Tensor,
        tensors: RouterTensors,
        input_ids: Tensor | None,
        out: Routing | None,
        select: _Selections,
        stream: int,
    ) -> Routing:
        """By cuBLAS's product, and the selection, which does what is left to be done to that."""
        given = None if out is None else out.logits
        products = self._products(hidden, weight, stream)
        if products is None or select.of_products is None:
            logits = torch_gemm.logits(hidden, weight, self._spec, tensors, None) if products is None else products
            routing = select.of_logits.outputs(logits if given is None else given.copy_(logits), out)
            select.of_logits.launch(routing, tensors, input_ids, stream)
        else:
            logits = empty((hidden.shape[0], self._spec.num_gate_rows), self._logits_dtype) if given is None else given
            routing = select.of_products.outputs(logits, out)
            select.of_products.launch(routing, tensors, input_ids, stream, products=products)
        return routing

    def _products(self, hidden: Tensor, weight: Tensor, stream: int) -> Tensor | None:
        """[M, K] -> float32 products, of which the logits are made; None: not of these dtypes."""
        kernels = self._split_by_dtype.get(hidden.dtype)
        if kernels is not None:
            self._check_dtype(weight)
            return kernels.products(hidden, weight, stream)
        if hidden.dtype == weight.dtype != torch.float32 and self._spec.input_norm_eps is None:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return None
