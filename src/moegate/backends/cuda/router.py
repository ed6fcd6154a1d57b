"""The chain of one gate: router GEMM, then selection."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moegate.backends.cuda import gemm, product, selection
from moegate.backends.cuda.memory import empty
from moegate.backends.cuda.sources import GemmDtypes, InputNorm, SelectDtypes
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
    """Make the logits of cuBLAS's products, where there is a `Product`."""


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
        scale, eps = dtypes.input_scale, spec.input_norm_eps
        self._norm = None if scale is None or eps is None else InputNorm(eps, scale)
        self._frozen, self._pdl = frozen, pdl
        self._gemm_tokens = gemm_tokens
        self._logits_dtype: torch.dtype = getattr(torch, spec.logits_dtype)
        self._has_gemm = gemm.unsupported(spec.hidden_size) is None
        gemm.warn_if_unsupported(spec.hidden_size)
        self._gemm_by_dtype: dict[torch.dtype, gemm.GemmKernels] = {}
        self._product: product.Product | None = None
        self._select_by_inputs: dict[tuple[torch.dtype | None, bool], _Selections] = {}

    def warmup(self, hidden: torch.dtype, input_ids: torch.dtype | None, *, aligned: bool = True) -> None:
        """Compiles what calls with these dtypes run."""
        spec = self._spec
        size = spec.hidden_size, spec.num_gate_rows
        operand = product.operand_of(self._weight_dtype, has_norm=self._norm is not None)
        if self._refuses_product(operand) is None:
            self._product = product.product_of(*size, self._weight_dtype, self._device, self._norm, pdl=self._pdl)
        if (input_ids, aligned) not in self._select_by_inputs:
            self._select_by_inputs[input_ids, aligned] = self._selections(input_ids, aligned=aligned)
        if self._has_gemm and hidden not in self._gemm_by_dtype:
            dtypes = GemmDtypes(
                hidden, self._weight_dtype, self._dtypes.bias, self._dtypes.input_scale, self._logits_dtype
            )
            self._gemm_by_dtype[hidden] = gemm.gemm_kernels(
                *size, dtypes, spec.input_norm_eps, self._device, frozen=self._frozen, pdl=self._pdl
            )

    def _selections(self, input_ids: torch.dtype | None, *, aligned: bool) -> _Selections:
        own = self._dtypes
        dtypes = SelectDtypes(self._logits_dtype, own.per_expert_scale, own.global_scale, own.tid2eid, input_ids)

        def kernels(dtypes: SelectDtypes, weight_parts: int) -> selection.SelectKernels:
            return selection.select_kernels(
                self._spec,
                dtypes,
                self._device,
                aligned=aligned,
                frozen=self._frozen,
                pdl=self._pdl,
                weight_parts=weight_parts,
            )

        of_products = None
        if self._product is not None:
            of_products = kernels(dtypes._replace(bias=own.bias), self._product.weight_parts)
        return _Selections(kernels(dtypes, 0), of_products)

    def route(
        self,
        hidden: Tensor,
        weight: Tensor,
        tensors: RouterTensors,
        input_ids: Tensor | None,
        out: Routing | None = None,
    ) -> Routing:
        """[M, K] -> the routing, with its logits, in `out` if that is given; see `moegate.route`."""
        if torch._C._cuda_getDevice() != self._index:
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
        routing = select.of_logits.outputs(logits, num_tokens, out)
        if num_tokens == 0:
            return routing
        assert gemm_kernels is not None
        self._check_dtype(weight)
        gemm_kernels.launch(hidden, weight, tensors.bias, tensors.input_scale, logits, num_tokens, stream)
        # Behind a short product the next layer's kernels wait for the logits: what they load early would be in the way
        # of these, or not, as the chip happens to place their blocks.
        is_short = num_tokens <= TOKENS_OF_TILE
        select.of_logits.launch(routing, tensors, input_ids, num_tokens, stream, holds_dependents=is_short)
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
        """By cuBLAS's product, of which the selection makes the logits where it is not these."""
        logits, rows = None if out is None else out.logits, self._spec.num_gate_rows
        num_tokens = hidden.shape[0]
        kernels, products, factors = select.of_logits, None, None
        reason = self._refuses_product(hidden.dtype)
        if reason is not None:
            product.warn_of_plain_product(reason)
            computed = torch_gemm.logits(hidden, weight, self._spec, tensors, None)
            logits = computed if logits is None else logits.copy_(computed)
        else:
            assert self._product is not None
            self._check_dtype(weight)
            products, factors = self._product(hidden, weight, tensors.input_scale, stream)
            if logits is None and product.are_logits(products, rows, self._dtypes.bias, self._logits_dtype):
                logits, products = products[0], None
            else:
                assert select.of_products is not None
                kernels = select.of_products
        if logits is None:
            logits = empty((num_tokens, rows), self._logits_dtype)
        routing = kernels.outputs(logits, num_tokens, out)
        kernels.launch(routing, tensors, input_ids, num_tokens, stream, products=products, norm_factors=factors)
        return routing

    def _refuses_product(self, hidden: torch.dtype) -> str | None:
        has_norm = self._norm is not None
        return product.unsupported(hidden, self._weight_dtype, self._spec.hidden_size, has_norm=has_norm)
