"""select.cuh: logits, or the partial sums that they are made of, to experts and weights in one kernel."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from moegate.cuda import device as gpu
from moegate.cuda import jit
from moegate.halves import BoundGemm, Call, KernelSource, Logits, Selection
from moegate.problem import Problem
from moegate.routing import Routing, outputs_of
from moegate.selection.select_text import ARGUMENTS, reads_fours, select_text, shared_words

# A token is a warp. Few are in blocks of two, up to so many in blocks of one; more are cheaper to start in larger ones.
_WARPS_OF_FEW, _MOST_SPREAD, _WARPS_OF_MANY = 2, 1024, 8


class Select(Selection):
    """Our kernel, for every spec and number of tokens."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return "select"

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """Why it cannot run."""
        return gpu.unsupported(problem.machine)

    def bind(self, problem: Problem, device: torch.device, gemm: BoundGemm | None) -> BoundSelect:
        """The kernels of a problem."""
        return BoundSelect(problem, device, gemm)

    def sources(self, problem: Problem, chip: gpu.Chip, num_tokens: int, num_terms: int) -> list[KernelSource]:
        """The kernel for so many tokens."""
        _, name, warps = next(size for size in _sizes(chip.num_sms, num_terms) if num_tokens <= size.most_tokens)
        blocks = -(-num_tokens // warps)
        plan = f"{blocks} block{'s' * (blocks > 1)} of {warps} warp{'s' * (warps > 1)}; a warp selects for a token"
        text = select_text(problem, aligned=reads_fours(problem.spec), num_terms=num_terms)
        return [KernelSource(name, "select.cuh", plan, text, 4 * shared_words(problem.spec) * warps)]


SELECT = Select()


class _Size(NamedTuple):
    most_tokens: int
    name: str
    """The kernel's, in the text."""
    warps: int
    """Of a block."""


def _sizes(num_sms: int, num_terms: int) -> tuple[_Size, ...]:
    """The kernels for few to many tokens; a call takes the first that serves its number."""
    return (
        _Size(_WARPS_OF_FEW * num_sms, "select_few", _WARPS_OF_FEW),
        _Size(_MOST_SPREAD, "select_some" if num_terms else "select_many", 1),
        _Size(sys.maxsize, "select_many", _WARPS_OF_MANY),
    )


_Kernels = tuple[tuple[int, int, jit.Kernel], ...]
"""The most tokens, warps of a block and kernel of each size."""


class BoundSelect:
    """The kernels for one problem, loaded for a device; others are when a call needs them."""

    def __init__(self, problem: Problem, device: torch.device, gemm: BoundGemm | None, arch: str | None = None) -> None:
        self._problem, self._device, self._arch = problem, device, arch
        ids, weights, logits, shared, identity = outputs_of(problem.spec)
        assert ids.columns is not None
        self._top_k, self._ids_dtype, self._weights_dtype = ids.columns, ids.dtype, weights.dtype
        self._logits = logits._replace(dtype=problem.logits_dtype)
        self._shared, self._identity = (each if each.is_there else None for each in (shared, identity))
        self._reads_fours = reads_fours(problem.spec)
        self._reads_four_logits = self._reads_fours and problem.spec.num_gate_rows % 4 == 0
        self._bytes_of_four = 4 * problem.logits_dtype.itemsize
        self._num_terms = 0 if gemm is None else gemm.num_terms
        self._holds_dependents_to = 0 if gemm is None else gemm.holds_dependents_to
        self._num_sms = gpu.chip_of(device, arch).num_sms
        # Where logits or biases are aligned, in the second place.
        self._of_logits: list[_Kernels | None] = [None, None]
        self._of_partial_sums: list[_Kernels | None] = [None, None]
        for num_terms in {0, self._num_terms}:
            self._load(self._reads_fours, num_terms)

    def _load(self, aligned: bool, num_terms: int) -> _Kernels:
        """Compiles for a kind of source, once."""
        problem = self._problem
        module = jit.load(select_text(problem, aligned=aligned, num_terms=num_terms), self._device, self._arch)
        bytes_of_warp = 4 * shared_words(problem.spec)

        def kernel_of(name: str, warps: int) -> jit.Kernel:
            # A multiprocessor must drain before its carve-out of shared memory changes. `select_few` asks for the
            # smallest carve-out, as most kernels in front do, and can start beside them. That leaves room for one block
            # on each multiprocessor, so that it serves at most 2 * num_sms tokens.
            return module.kernel(
                name,
                ARGUMENTS.format,
                32 * warps,
                shared_bytes=bytes_of_warp * warps,
                least_shared=name == "select_few",
                pdl=problem.pdl,
            )

        kernels = tuple((most, warps, kernel_of(name, warps)) for most, name, warps in _sizes(self._num_sms, num_terms))
        (self._of_partial_sums if num_terms else self._of_logits)[aligned] = kernels
        return kernels

    def __call__(self, call: Call, logits: Logits) -> Routing:
        """The routing of M > 0 tokens, of logits [M, R] whose rows may be apart, or of partial sums."""
        num_tokens, _, _, tensors, input_ids, padding, _, out, stream = call
        if isinstance(logits, Tensor) and (out is None or out.logits is None or out.logits is logits):
            source, made, norm_factors, num_splits = logits, logits, None, 0
        else:
            source, made, norm_factors, num_splits = self._source_of(num_tokens, logits, out)
        bias, correction_bias, _, per_expert_scale, global_scale, table = tensors
        address, stride = made.data_ptr(), source.stride()[-2]
        bias_address = 0 if correction_bias is None else correction_bias.data_ptr()
        aligned = self._reads_fours and bias_address % 16 == 0
        if aligned and self._reads_four_logits:
            aligned = address % self._bytes_of_four == 0 and stride % 4 == 0
        kernels = (self._of_partial_sums if num_splits else self._of_logits)[aligned]
        if kernels is None:
            kernels = self._load(aligned, self._num_terms if num_splits else 0)
        most_tokens, warps, kernel = kernels[0]
        if num_tokens > most_tokens:
            most_tokens, warps, kernel = next(size for size in kernels if num_tokens <= size[0])
        routing = out if out is not None and out.logits is made else self._outputs(num_tokens, made, out)
        ids, weights, _, shared_weights, identity_weight = routing
        kernel.launch(
            (-(-num_tokens // warps), 1),
            stream,
            source.data_ptr() if num_splits else address,
            bias_address,
            0 if per_expert_scale is None else per_expert_scale.data_ptr(),
            0 if global_scale is None else global_scale.data_ptr(),
            0 if table is None else table.data_ptr(),
            0 if input_ids is None else input_ids.data_ptr(),
            0 if padding is None else padding.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if norm_factors is None else norm_factors.data_ptr(),
            address,
            ids.data_ptr(),
            weights.data_ptr(),
            0 if shared_weights is None else shared_weights.data_ptr(),
            0 if identity_weight is None else identity_weight.data_ptr(),
            stride,
            0 if table is None else table.stride(0),
            0 if table is None else table.shape[0],
            num_tokens,
            num_splits,
            num_tokens <= self._holds_dependents_to,
        )
        return routing

    def _source_of(
        self, num_tokens: int, logits: Logits, out: Routing | None
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """What is read, the logits as they are returned, norm factors, and num_splits (0: logits are read)."""
        place = None if out is None else out.logits
        if isinstance(logits, Tensor):
            made = logits if place is None or place is logits else place.copy_(logits)
            return made, made, None, 0
        made = gpu.empty(self._logits.shape(num_tokens), self._logits.dtype) if place is None else place
        return logits.sums, made, logits.norm_factors, logits.sums.shape[0]

    def _outputs(self, num_tokens: int, logits: Tensor, out: Routing | None) -> Routing:
        """The tensors to be filled: those of `out`, or new ones on the current device."""
        if out is not None:
            ids, weights, _, shared_weights, identity_weight = out
            return tuple.__new__(Routing, (ids, weights, logits, shared_weights, identity_weight))
        shared, identity = self._shared, self._identity
        return tuple.__new__(  # in half of the time of Routing(...)
            Routing,
            (
                gpu.empty_rows(num_tokens, self._top_k, self._ids_dtype),
                gpu.empty_rows(num_tokens, self._top_k, self._weights_dtype),
                logits,
                None if shared is None else gpu.empty(shared.shape(num_tokens), shared.dtype),
                None if identity is None else gpu.empty(identity.shape(num_tokens), identity.dtype),
            ),
        )
