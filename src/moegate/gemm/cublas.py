"""cuBLAS's split-K GEMM for many tokens: hidden states to partial sums, which the selection adds up (split_k.cuh).

cuBLAS runs one thread block for each output tile, so that a few hundred tokens fill only a few multiprocessors. K in
num_splits slices, multiplied as one batched GEMM, gives num_splits times as many tiles.

A GEMM of float32 matrices does not use tensor cores, which would round them to 11 bits. As the sum of bfloat16 terms a
float32 weight keeps its bits (contract 1.1 has the ends of the range), and so does a weight that an input norm's scale
was multiplied into.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moegate.contract.limits import MAX_DECODE_TOKENS
from moegate.cuda import device as gpu
from moegate.cuda import jit, text
from moegate.gemm.router_gemm import promises_bits, unsupported_size
from moegate.gemm.torch_mm import BoundMm
from moegate.halves import BoundGemm, Call, Gemm, KernelSource, Logits, PartialSums
from moegate.problem import Problem, short
from moegate.warn import warn_once

PREPARE_ARGUMENTS = text.Arguments(
    "PrepareArguments",
    weight="const void*",
    terms="void*",  # [columns, K]: the first terms of all rows, then the second, then the third
    input_scale="const void*",  # [K]; this and what follows with an input norm
    hidden="const void*",  # [M, K]
    factors="float*",  # [M]
    weight_stride="int64",  # elements from row to row
    hidden_stride="int64",
    num_tokens="int32",
)
REDUCE_ARGUMENTS = text.Arguments(
    "ReduceArguments",
    partial_sums="const float*",
    bias="const void*",
    logits="void*",
    count="int64",  # M * R
    stride="int64",  # columns
    num_splits="int32",
)
_THREADS = 256
_BLOCKS_OF_SM = 8  # of 256 threads: as many as are on a multiprocessor at once
_MOST_SPLITS, _LEAST_SLICE, _STEP_OF_TILE, _NUMBERS_OF_SM = 8, 256, 64, 6144  # of `num_splits_of`


class Cublas(Gemm):
    """Partial sums by cuBLAS; PyTorch's operations make the logits where its operands do not fit."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return "cublas"

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """Why it cannot run for so many tokens."""
        if promises_bits(problem, num_tokens):
            return f"its bits depend on M, and up to {MAX_DECODE_TOKENS} tokens router_gemm's do not"
        return gpu.unsupported(problem.machine)

    def falls_back(self, problem: Problem) -> str | None:
        """Why PyTorch's operations make the logits in its place."""
        hidden_dtype, weight_dtype = problem.dtypes.hidden, problem.dtypes.weight
        is_split = _is_split_into_terms(problem)
        operand = torch.bfloat16 if is_split else weight_dtype
        beside = f"beside a weight in {short(weight_dtype)}{' and an input norm' * _has_norm(problem)}"
        if hidden_dtype != operand:
            return f"{beside}, cuBLAS takes hidden states in {short(operand)}, and these are in {short(hidden_dtype)}"
        if is_split and problem.spec.hidden_size % 8 != 0:
            return f"{beside}, K = {problem.spec.hidden_size} is not a multiple of 8"
        return None

    def bind(self, problem: Problem, device: torch.device) -> BoundGemm:
        """Compiles the kernels around cuBLAS."""
        size = unsupported_size(problem.spec.hidden_size)
        if size is not None:
            warn_once(f"{size}: PyTorch's matrix product takes the kernel's place")
        reason = self.falls_back(problem)
        if reason is not None:
            slow = f"{reason}: PyTorch's operations make the logits where cuBLAS would, more slowly"
            return BoundMm(problem, slow)
        return BoundCublas(problem, device)

    def num_terms(self, problem: Problem, chip: gpu.Chip, num_tokens: int) -> int:
        """Of the weight in the partial sums; 0: cuBLAS writes the logits."""
        layout = layout_of(problem)
        num_splits = num_splits_of(num_tokens, layout.columns, problem.spec.hidden_size, chip.num_sms)
        return 0 if self.falls_back(problem) is not None or are_logits(problem, num_splits) else layout.num_terms

    def sources(self, problem: Problem, chip: gpu.Chip, num_tokens: int, num_terms: int) -> list[KernelSource]:
        """The GEMM for so many tokens, and the kernel in front of cuBLAS."""
        if self.falls_back(problem) is not None:
            return []
        layout, hidden_size = layout_of(problem), problem.spec.hidden_size
        num_splits = num_splits_of(num_tokens, layout.columns, hidden_size, chip.num_sms)
        shape = f"[{num_tokens}, {hidden_size}] x [{hidden_size}, {layout.columns}]"
        plan = f"{shape} in {short(layout.operand_dtype)}; num_splits {num_splits}, num_terms {layout.num_terms}"
        made = [KernelSource("cuBLAS", "", plan, "", 0)]
        if layout.has_copy:
            plan = f"blocks of {_THREADS} threads, at most {_BLOCKS_OF_SM} a multiprocessor; a thread has 8 elements"
            made.insert(0, KernelSource("prepare_operands", "split_k.cuh", plan, prepare_source(problem), 0))
        return made


CUBLAS = Cublas()


class Layout(NamedTuple):
    """What cuBLAS multiplies in the place of a weight [R, K]."""

    operand_dtype: torch.dtype
    """Also of the hidden states."""
    num_terms: int
    """An element of the weight, times the norm's scale, is the sum of so many 16-bit terms."""
    columns: int
    """Of the partial sums."""
    has_copy: bool
    """The operand is not the weight itself."""


def layout_of(problem: Problem) -> Layout:
    """The layout for a problem."""
    spec, rows = problem.spec, problem.spec.num_gate_rows
    num_terms = _num_terms(problem)
    # cuBLAS takes two to four times as long for another number of columns (docs/notes/h100.md).
    columns = -(-num_terms * rows // 8) * 8 if spec.hidden_size % 8 == 0 else num_terms * rows
    operand = torch.bfloat16 if _is_split_into_terms(problem) else problem.dtypes.weight
    return Layout(operand, num_terms, columns, columns != rows)


def num_splits_of(num_tokens: int, columns: int, hidden_size: int, num_sms: int) -> int:
    """The slices of K for partial sums [num_tokens, columns].

    As many as give a multiprocessor no more than a few thousand numbers to write, which are read again to be added up.
    A slice has at least 256 of K, and whole steps of cuBLAS's tiles. Measured on an H100 (docs/notes/h100.md).
    """
    most = min(_MOST_SPLITS, hidden_size // _LEAST_SLICE, _NUMBERS_OF_SM * num_sms // (num_tokens * columns))
    return next((count for count in range(most, 1, -1) if hidden_size % (count * _STEP_OF_TILE) == 0), 1)


def are_logits(problem: Problem, num_splits: int) -> bool:
    """True if what cuBLAS writes needs neither a sum nor a bias nor a rounding."""
    plain = problem.dtypes.bias is None and problem.logits_dtype == torch.float32
    return plain and num_splits == 1 and layout_of(problem).columns == problem.spec.num_gate_rows


def _has_norm(problem: Problem) -> bool:
    return problem.spec.input_norm_eps is not None


def _is_split_into_terms(problem: Problem) -> bool:
    return problem.dtypes.weight == torch.float32 or _has_norm(problem)


def _num_terms(problem: Problem) -> int:
    dtypes = problem.dtypes
    if not _has_norm(problem):
        return 3 if dtypes.weight == torch.float32 else 1
    return 2 if dtypes.weight == dtypes.input_scale == torch.bfloat16 else 3  # 8 bits times 8 bits are 16


def prepare_source(problem: Problem) -> str:
    """split_k.cuh's `prepare_operands` for one problem."""
    spec, dtypes, layout = problem.spec, problem.dtypes, layout_of(problem)
    types = {
        "Hidden": layout.operand_dtype,
        "Weight": dtypes.weight,
        "InputScale": dtypes.input_scale or torch.float32,
    }
    constants = {
        "int kHidden": spec.hidden_size,
        "int kRows": spec.num_gate_rows,
        "int kNumTerms": layout.num_terms,
        "int kColumns": layout.columns,
        **text.norm_constants(spec.hidden_size, spec.input_norm_eps),
    }
    kernel = text.kernel("prepare_operands", "prepare_operands<Config>", PREPARE_ARGUMENTS, _THREADS)
    return _around_cublas(types, constants, kernel)


def reduce_source(problem: Problem) -> str:
    """split_k.cuh's `reduce_splits` for one problem."""
    bias = problem.dtypes.bias
    types = {"Bias": bias or torch.float32, "Logits": problem.logits_dtype}
    constants: dict[str, object] = {
        "int kRows": problem.spec.num_gate_rows,
        "int kNumTerms": layout_of(problem).num_terms,
        "bool kHasBias": bias is not None,
    }
    kernel = text.kernel("reduce_splits", "reduce_splits<Config>", REDUCE_ARGUMENTS, _THREADS)
    return _around_cublas(types, constants, kernel)


def _around_cublas(types: dict[str, torch.dtype], constants: dict[str, object], kernel: str) -> str:
    config = text.config(types, constants)
    return text.translation_unit("split_k.cuh", [PREPARE_ARGUMENTS, REDUCE_ARGUMENTS], config, kernel)


class BoundCublas:
    """cuBLAS and the kernels around it, for one problem on a device."""

    holds_dependents_to = 0

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._problem, self._device = problem, device
        self._layout = layout_of(problem)
        self.num_terms = self._layout.num_terms
        self._rows, self._hidden_size = problem.spec.num_gate_rows, problem.spec.hidden_size
        self._logits_dtype, self._has_norm = problem.logits_dtype, _has_norm(problem)
        self._num_sms = gpu.chip_of(device).num_sms
        self._writes_logits = are_logits(problem, 1)
        self._prepare: jit.Kernel | None = None
        self._reduce: jit.Kernel | None = None
        if self._layout.has_copy:
            module = jit.load(prepare_source(problem), device)
            self._prepare = module.kernel("prepare_operands", PREPARE_ARGUMENTS.format, _THREADS, pdl=problem.pdl)

    def __call__(self, call: Call) -> Logits:
        """The logits, where they are what cuBLAS writes; else the partial sums, of M > 0 tokens."""
        out = call.out
        made = self.partial_sums(call)
        has_place = out is not None and out.logits is not None
        if self._writes_logits and not has_place and made.sums.shape[0] == 1:
            return made.sums[0]
        return made

    def logits(self, call: Call) -> Tensor:
        """The logits, of M > 0 tokens."""
        made = self(call)
        if isinstance(made, Tensor):
            return made
        logits = gpu.empty_rows(call.num_tokens, self._rows, self._logits_dtype)
        self.reduce(made, call.tensors.bias, logits, call.stream)
        return logits

    def partial_sums(self, call: Call) -> PartialSums:
        """What cuBLAS writes."""
        hidden, weight, factors = call.hidden, call.weight, None
        assert weight.dtype == self._problem.dtypes.weight, "Gate.refresh() was not called after a change of dtype"
        if self._prepare is not None:
            weight, factors = self._prepared(self._prepare, call)
        num_splits = num_splits_of(len(hidden), len(weight), self._hidden_size, self._num_sms)
        if num_splits == 1:
            return PartialSums(torch.mm(hidden, weight.t(), out_dtype=torch.float32).unsqueeze(0), factors)
        cut = num_splits, self._hidden_size // num_splits
        of_hidden, of_weight = hidden.unflatten(1, cut), weight.unflatten(1, cut)
        sums = torch.bmm(of_hidden.transpose(0, 1), of_weight.permute(1, 2, 0), out_dtype=torch.float32)
        return PartialSums(sums, factors)

    def _prepared(self, prepare: jit.Kernel, call: Call) -> tuple[Tensor, Tensor | None]:
        """The terms [columns, K] of a weight [R, K], and `PartialSums.norm_factors`."""
        hidden = gpu.aligned_rows(call.hidden, "hidden") if self._has_norm else call.hidden
        weight = gpu.aligned_rows(call.weight, "weight")
        terms = gpu.empty_rows(self._layout.columns, self._hidden_size, self._layout.operand_dtype)
        factors = gpu.empty((len(hidden),), torch.float32) if self._has_norm else None
        threads = weight.numel() // 8 + (32 * len(hidden) if self._has_norm else 0)
        prepare.launch(
            self._grid(threads),
            call.stream,
            weight.data_ptr(),
            terms.data_ptr(),
            gpu.address_of(call.tensors.input_scale),
            hidden.data_ptr(),
            gpu.address_of(factors),
            weight.stride(0),
            hidden.stride(0),
            len(hidden),
        )
        return terms, factors

    def reduce(self, made: PartialSums, bias: Tensor | None, logits: Tensor, stream: int) -> None:
        """Partial sums to logits [M, R], where no selection follows and no input norm was in front."""
        assert made.norm_factors is None
        if self._reduce is None:
            module = jit.load(reduce_source(self._problem), self._device)
            self._reduce = module.kernel("reduce_splits", REDUCE_ARGUMENTS.format, _THREADS)
        num_splits, _, columns = made.sums.shape
        self._reduce.launch(
            self._grid(logits.numel()),
            stream,
            made.sums.data_ptr(),
            gpu.address_of(bias),
            logits.data_ptr(),
            logits.numel(),
            columns,
            num_splits,
        )

    def _grid(self, threads: int) -> tuple[int, int]:
        return min(_BLOCKS_OF_SM * self._num_sms, -(-threads // _THREADS)), 1
