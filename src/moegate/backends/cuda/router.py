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
        self._select_by_inputs: dict[tuple[torch.dtype | None, bool], selection.SelectKernels] = {}

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
            own = self._dtypes
            select_dtypes = SelectDtypes(
                self._logits_dtype, own.per_expert_scale, own.global_scale, own.tid2eid, input_ids
            )
            self._select_by_inputs[input_ids, aligned] = selection.select_kernels(
                self._spec, select_dtypes, self._device, aligned=aligned, frozen=self._frozen, pdl=self._pdl
            )

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
        is_short = num_tokens <= TOKENS_OF_TILE
        # `gemm_tokens` is of hidden states with 16 bits: of others no times are known (choice/costs.py).
        most = self._gemm_tokens if hidden.dtype != torch.float32 else MAX_DECODE_TOKENS
        if num_tokens > 0 and (gemm_kernels is None or num_tokens > most):
            is_short = False
            routing = select.outputs(self._logits_of_many(hidden, weight, tensors, logits, stream), out)
        else:
            if logits is None:
                logits = empty((num_tokens, self._spec.num_gate_rows), self._logits_dtype)
            routing = select.outputs(logits, out)
            if num_tokens == 0:
                return routing
            assert gemm_kernels is not None
            self._check_dtype(weight)
            gemm_kernels.launch(hidden, weight, tensors.bias, tensors.input_scale, logits, stream)
        # Behind a short product the next layer's kernels wait for the logits: what they load early would be in the way
        # of these, or not, as the chip happens to place their blocks.
        select.launch(routing, tensors, input_ids, stream, holds_dependents=is_short)
        return routing

    def _check_dtype(self, weight: Tensor) -> None:
        assert weight.dtype == self._weight_dtype, "Gate.refresh() was not called after a change of dtype"

    def _logits_of_many(
        self, hidden: Tensor, weight: Tensor, tensors: RouterTensors, logits: Tensor | None, stream: int
    ) -> Tensor:
        """[M, K] -> logits [M, R] by cuBLAS, in `logits` if that is given."""
        kernels = self._split_by_dtype.get(hidden.dtype)
        if kernels is None:
            computed = torch_gemm.logits(hidden, weight, self._spec, tensors, None)
            return computed if logits is None else logits.copy_(computed)
        self._check_dtype(weight)
        if logits is None:
            logits = empty((hidden.shape[0], self._spec.num_gate_rows), self._logits_dtype)
        kernels.product(hidden, weight, tensors.bias, logits, stream)
        return logits
