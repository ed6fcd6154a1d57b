"""router_gemm.cuh: hidden states to logits, in one kernel for few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.contract.limits import MAX_DECODE_TOKENS
from moegate.cuda import device as gpu
from moegate.cuda import jit, text
from moegate.gemm.router_gemm_tiling import (
    COLUMNS_OF_STEP,
    MAX_GEMM_TOKENS,
    ROWS_OF_TILE,
    TOKEN_PITCH,
    TOKENS_OF_TILE,
    Tiling,
    bytes_of_block,
    cut_tokens,
    shared_bytes,
    terms_of,
    tiling_of,
    warp_pitch,
)
from moegate.halves import Call, Gemm, KernelSource
from moegate.problem import Problem

ARGUMENTS = text.Arguments(
    "GemmArguments",
    hidden="const void*",
    weight="const void*",
    bias="const void*",
    input_scale="const void*",
    logits="void*",  # [M, R], contiguous
    hidden_stride="int64",  # elements from row to row
    weight_stride="int64",
    num_tokens="int32",
)


class RouterGemm(Gemm):
    """Our kernel, for up to `MAX_GEMM_TOKENS` tokens: the same bits of a token at every number of tokens."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return "router_gemm"

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """Why it cannot run for so many tokens."""
        if num_tokens > MAX_GEMM_TOKENS:
            return f"the GEMM takes up to {MAX_GEMM_TOKENS} tokens"
        return gpu.unsupported(problem.machine) or unsupported_size(problem.spec.hidden_size)

    def bind(self, problem: Problem, device: torch.device) -> BoundRouterGemm:
        """The kernels of a problem."""
        return BoundRouterGemm(problem, device)

    def sources(self, problem: Problem, chip: gpu.Chip, num_tokens: int, num_terms: int) -> list[KernelSource]:
        """The kernel for so many tokens."""
        tiling = tiling_for(problem, chip)
        cut = cut_tokens(num_tokens, tiling, chip)
        clusters = f", in clusters of {tiling.num_splits}, which split K" if tiling.num_splits > 1 else ""
        plan = (
            f"{tiling.row_blocks} x {cut.token_groups} blocks of {tiling.warps} warps{clusters}; "
            f"{ROWS_OF_TILE} rows and {TOKENS_OF_TILE * cut.tiles} tokens a block, padded where there are fewer; "
            f"{tiling.steps} steps of {COLUMNS_OF_STEP} columns a warp, {tiling.ahead[cut.tiles]} in flight at once"
        )
        size = bytes_of_block(cut.tiles, tiling, chip, is_alone=cut.is_alone)
        used = shared_bytes(tiling.num_splits, tiling.warps, cut.tiles)
        if size > used:
            plan += f"; it uses {used} bytes of shared memory, and asks for more to be alone on its multiprocessor"
        return [KernelSource(f"gemm_{cut.tiles}", "router_gemm.cuh", plan, source(problem, tiling), size)]


ROUTER_GEMM = RouterGemm()


def unsupported_size(hidden_size: int) -> str | None:
    """None, or the reason why the kernel cannot take such a K."""
    return None if hidden_size % 8 == 0 else f"K = {hidden_size} is not a multiple of 8, which a lane loads at once"


def promises_bits(problem: Problem, num_tokens: int) -> bool:
    """True where router_gemm runs whatever is faster: contract, part 6."""
    return num_tokens <= MAX_DECODE_TOKENS and ROUTER_GEMM.unsupported(problem, num_tokens) is None


def tiling_for(problem: Problem, chip: gpu.Chip) -> Tiling:
    """The tiling for a problem."""
    spec = problem.spec
    return tiling_of(spec.hidden_size, spec.num_gate_rows, _terms(problem)[:2], chip)


def source(problem: Problem, tiling: Tiling) -> str:
    """router_gemm.cuh for one problem: a kernel `gemm_T` for each T of `tiling.ahead`."""
    spec, dtypes = problem.spec, problem.dtypes
    hidden_terms, weight_terms, is_fp16 = _terms(problem)
    constants = {
        "int kHidden": spec.hidden_size,
        "int kRows": spec.num_gate_rows,
        "int kNumSplits": tiling.num_splits,
        "int kWarps": tiling.warps,
        "int kSteps": tiling.steps,
        "int kTokenPitch": TOKEN_PITCH,
        "int kHiddenTerms": hidden_terms,
        "int kWeightTerms": weight_terms,
        "bool kIsFp16": is_fp16,
        "bool kHasBias": dtypes.bias is not None,
        **text.norm_constants(spec.hidden_size, spec.input_norm_eps),
        "bool kFrozen": problem.frozen,
    }
    types = {
        "Hidden": dtypes.hidden,
        "Weight": dtypes.weight,
        "Bias": dtypes.bias or torch.float32,
        "InputScale": dtypes.input_scale or torch.float32,
        "Logits": problem.logits_dtype,
    }
    tiled = (
        "template <int kTiles, int kStepsAhead, int kPitchOfWarp, int kBytes>\nstruct Tiled : Config {\n"
        "  static constexpr int kTokenTiles = kTiles, kAhead = kStepsAhead;\n"
        "  static constexpr int kWarpPitch = kPitchOfWarp, kSharedBytes = kBytes;\n};\n"
    )
    kernels = [
        text.kernel(f"gemm_{tiles}", f"router_gemm<Tiled<{values}>>", ARGUMENTS, 32 * tiling.warps, 1)
        for tiles, ahead in tiling.ahead.items()
        for values in [f"{tiles}, {ahead}, {warp_pitch(tiles)}, {shared_bytes(tiling.num_splits, tiling.warps, tiles)}"]
    ]
    return text.translation_unit("router_gemm.cuh", [ARGUMENTS], text.config(types, constants) + tiled, *kernels)


def _terms(problem: Problem) -> tuple[int, int, bool]:
    has_norm = problem.spec.input_norm_eps is not None
    return terms_of(problem.dtypes.hidden, problem.dtypes.weight, has_norm=has_norm)


class BoundRouterGemm:
    """The kernels for one problem, loaded for a device."""

    num_terms = 0
    holds_dependents_to = TOKENS_OF_TILE
    """The next layer's kernels wait for a GEMM of one token tile: what they load early would compete with its selection
    for bandwidth, or not, as the chip happens to place their blocks."""

    def __init__(self, problem: Problem, device: torch.device, arch: str | None = None) -> None:
        self._rows, self._logits_dtype = problem.spec.num_gate_rows, problem.logits_dtype
        self._weight_dtype = problem.dtypes.weight
        chip = gpu.chip_of(device, arch)
        tiling = tiling_for(problem, chip)
        module = jit.load(source(problem, tiling), device, arch)
        self._chip, self._tiling = chip, tiling
        cuts = (
            cut_tokens(tokens, tiling, chip) for tokens in range(TOKENS_OF_TILE, MAX_GEMM_TOKENS + 1, TOKENS_OF_TILE)
        )
        self._kernels = {
            (tiles, is_alone): module.kernel(
                f"gemm_{tiles}",
                ARGUMENTS.format,
                32 * tiling.warps,
                cluster=tiling.num_splits,
                shared_bytes=bytes_of_block(tiles, tiling, chip, is_alone=is_alone),
                pdl=problem.pdl,
            )
            for tiles, is_alone in dict.fromkeys((cut.tiles, cut.is_alone) for cut in cuts)
        }
        self._launches: dict[int, tuple[jit.Kernel, tuple[int, int]]] = {}

    def _launch_of(self, num_tokens: int) -> tuple[jit.Kernel, tuple[int, int]]:
        """The kernel and its grid, found out once for each number of tokens."""
        cut = cut_tokens(num_tokens, self._tiling, self._chip)
        kernel = self._kernels[cut.tiles, cut.is_alone]
        found = self._launches[num_tokens] = kernel, (self._tiling.row_blocks, cut.token_groups)
        return found

    def __call__(self, call: Call) -> Tensor:
        """The logits [M, R], M from 1 to `MAX_GEMM_TOKENS`."""
        num_tokens, hidden, weight, tensors, _, _, _, out, stream = call
        assert weight.dtype == self._weight_dtype, "Gate.refresh() was not called after a change of dtype"
        logits = None if out is None else out.logits
        if logits is None:
            logits = gpu.empty_rows(num_tokens, self._rows, self._logits_dtype)
        # stride()[0], not stride(0): a getter without arguments takes the host two thirds of the time.
        source, stride = hidden.data_ptr(), hidden.stride()[0]
        rows, row_stride = weight.data_ptr(), weight.stride()[0]
        if not gpu.are_surely_aligned(source | rows, stride | row_stride):
            hidden, weight = gpu.aligned_rows(hidden, "hidden"), gpu.aligned_rows(weight, "weight")
            source, stride = hidden.data_ptr(), hidden.stride(0)
            rows, row_stride = weight.data_ptr(), weight.stride(0)
        kernel, grid = self._launches.get(num_tokens) or self._launch_of(num_tokens)
        bias, _, input_scale, _, _, _ = tensors
        kernel.launch(
            grid,
            stream,
            source,
            rows,
            0 if bias is None else bias.data_ptr(),
            0 if input_scale is None else input_scale.data_ptr(),
            logits.data_ptr(),
            stride,
            row_stride,
            num_tokens,
        )
        return logits

    logits = __call__
