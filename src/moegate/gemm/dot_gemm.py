"""dot_gemm.cuh: hidden states to logits as dot products in float32, for a float32 weight and up to four tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moegate.contract.limits import MAX_DECODE_TOKENS
from moegate.cuda import device as gpu
from moegate.cuda import jit, text
from moegate.gemm.router_gemm import promises_bits, unsupported_size
from moegate.halves import Call, Gemm, KernelSource
from moegate.problem import Problem, short

ARGUMENTS = text.Arguments(
    "DotArguments",
    hidden="const void*",
    weight="const void*",
    bias="const void*",
    logits="void*",  # [M, R], contiguous
    hidden_stride="int64",  # elements from row to row
    weight_stride="int64",
    num_tokens="int32",
)
MAX_DOT_TOKENS = 4
_OF_KERNELS = (1, 2, MAX_DOT_TOKENS)  # tokens
_VECS_OF_WARP = 32  # of four elements: one a lane
_MOST_WARPS, _MOST_ROWS = 16, 4  # of a block
_MOST_VECS = 8  # of a thread, in all rows of its block: they leave registers for four tokens
MAX_COLUMNS = 4 * _VECS_OF_WARP * _MOST_WARPS * _MOST_VECS


@dataclass(frozen=True)
class Tiling:
    """Who sums what. The number of tokens changes nothing here."""

    rows: int
    """Of the weight, to a block; a power of two."""
    warps: int
    """Of a block, which share its rows column by column."""
    vecs: int
    """Of four elements, of each row to a thread."""


class DotGemm(Gemm):
    """Our kernel for one token or few, where the weight is a float32."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return "dot_gemm"

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """Why it cannot run for so many tokens."""
        hidden_size, weight_dtype = problem.spec.hidden_size, problem.dtypes.weight
        machine = gpu.unsupported(problem.machine)
        if machine is not None:
            return machine
        if weight_dtype != torch.float32:
            return f"it takes a weight in float32, and this one is in {short(weight_dtype)}"
        if num_tokens > MAX_DOT_TOKENS:
            return f"the GEMM takes up to {MAX_DOT_TOKENS} tokens"
        if problem.spec.input_norm_eps is not None:
            return "it has no input norm"
        if hidden_size > MAX_COLUMNS:
            return f"K = {hidden_size} is more than the {MAX_COLUMNS} columns that a block has registers for"
        return unsupported_size(hidden_size)

    def breaks(self, problem: Problem, num_tokens: int) -> str | None:
        """The promise that it does not keep where router_gemm does."""
        if promises_bits(problem, num_tokens):
            return f"a token's bits would depend on M up to {MAX_DECODE_TOKENS}"
        return None

    def sources(self, problem: Problem, chip: gpu.Chip, num_tokens: int, num_terms: int) -> list[KernelSource]:
        """The kernel for so many tokens."""
        tiling = tiling_of(problem.spec.hidden_size, problem.spec.num_gate_rows, chip)
        name = f"dot_{_tokens_of_kernel(num_tokens)}"
        blocks = -(-problem.spec.num_gate_rows // tiling.rows)
        plan = (
            f"{blocks} blocks of {tiling.warps} warps; {tiling.rows} rows of the weight a block, "
            f"{tiling.vecs} float4 of each in flight in a thread"
        )
        return [KernelSource(name, "dot_gemm.cuh", plan, source(problem, tiling), 0)]

    def bind(self, problem: Problem, device: torch.device) -> BoundDotGemm:
        """The kernels of a problem."""
        spec = problem.spec
        return BoundDotGemm(problem, tiling_of(spec.hidden_size, spec.num_gate_rows, gpu.chip_of(device)), device)


DOT_GEMM = DotGemm()


def tiling_of(hidden_size: int, rows: int, chip: gpu.Chip) -> Tiling:
    """The tiling for a weight [rows, hidden_size]: as few rows to a block as give each block a multiprocessor."""
    vecs_of_row = -(-hidden_size // 4)
    vecs = -(-vecs_of_row // (_VECS_OF_WARP * _MOST_WARPS))
    rows_of_block = 1
    while 2 * rows_of_block <= min(_MOST_ROWS, _MOST_VECS // vecs) and rows_of_block * chip.num_sms < rows:
        rows_of_block *= 2
    return Tiling(rows_of_block, -(-vecs_of_row // (_VECS_OF_WARP * vecs)), vecs)


def _tokens_of_kernel(num_tokens: int) -> int:
    return min(most for most in _OF_KERNELS if most >= num_tokens)


def source(problem: Problem, tiling: Tiling) -> str:
    """dot_gemm.cuh for one problem: a kernel `dot_T` for up to T tokens, for each T of `_OF_KERNELS`."""
    spec, dtypes = problem.spec, problem.dtypes
    constants = {
        "int kHidden": spec.hidden_size,
        "int kRows": spec.num_gate_rows,
        "int kRowsOfBlock": tiling.rows,
        "int kWarps": tiling.warps,
        "int kVecs": tiling.vecs,
        "bool kHasBias": dtypes.bias is not None,
        "bool kFrozen": problem.frozen,
    }
    types = {"Hidden": dtypes.hidden, "Bias": dtypes.bias or torch.float32, "Logits": problem.logits_dtype}
    of_tokens = "template <int kCount>\nstruct OfTokens : Config {\n  static constexpr int kTokens = kCount;\n};\n"
    kernels = [
        text.kernel(f"dot_{tokens}", f"dot_gemm<OfTokens<{tokens}>>", ARGUMENTS, 32 * tiling.warps, 1)
        for tokens in _OF_KERNELS
    ]
    return text.translation_unit("dot_gemm.cuh", [ARGUMENTS], text.config(types, constants) + of_tokens, *kernels)


class BoundDotGemm:
    """The kernels for one problem, loaded for a device."""

    num_terms = 0
    holds_dependents_to = MAX_DOT_TOKENS
    """As behind router_gemm, what the next layer's kernels load early would compete with this layer's selection."""

    def __init__(self, problem: Problem, tiling: Tiling, device: torch.device, arch: str | None = None) -> None:
        self._rows, self._logits_dtype = problem.spec.num_gate_rows, problem.logits_dtype
        module = jit.load(source(problem, tiling), device, arch)
        kernels = {
            tokens: module.kernel(f"dot_{tokens}", ARGUMENTS.format, 32 * tiling.warps, pdl=problem.pdl)
            for tokens in _OF_KERNELS
        }
        self._kernels = [kernels[_tokens_of_kernel(m)] for m in range(1, MAX_DOT_TOKENS + 1)]
        self._grid = -(-self._rows // tiling.rows), 1

    def __call__(self, call: Call) -> Tensor:
        """The logits [M, R], M from 1 to `MAX_DOT_TOKENS`."""
        num_tokens, hidden, weight, tensors, _, _, _, out, stream = call
        assert weight.dtype == torch.float32, "Gate.refresh() was not called after a change of dtype"
        logits = None if out is None else out.logits
        if logits is None:
            logits = gpu.empty_rows(num_tokens, self._rows, self._logits_dtype)
        # As in router_gemm: stride()[0], and a quick question before the thorough one, for the host's time.
        source, stride = hidden.data_ptr(), hidden.stride()[0]
        rows, row_stride = weight.data_ptr(), weight.stride()[0]
        if not gpu.are_surely_aligned(source | rows, stride | row_stride):
            hidden, weight = gpu.aligned_rows(hidden, "hidden"), gpu.aligned_rows(weight, "weight")
            source, stride = hidden.data_ptr(), hidden.stride(0)
            rows, row_stride = weight.data_ptr(), weight.stride(0)
        self._kernels[num_tokens - 1].launch(
            self._grid,
            stream,
            source,
            rows,
            gpu.address_of(tensors.bias),
            logits.data_ptr(),
            stride,
            row_stride,
            num_tokens,
        )
        return logits

    logits = __call__
