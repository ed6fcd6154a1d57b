"""Launches router_gemm.cuh: hidden states to logits, for up to `MAX_GEMM_TOKENS` tokens."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moegate.backends.cuda import jit
from moegate.backends.cuda.alignment import aligned_rows, are_surely_aligned
from moegate.backends.cuda.sources import GemmDtypes, gemm_source
from moegate.backends.cuda.tiling import (
    MAX_GEMM_TOKENS,
    TOKENS_OF_TILE,
    Chip,
    bytes_of_block,
    cut_tokens,
    parts,
    plan_gemm,
)
from moegate.warn import warn_once

_FIELDS = "PPPPPqqi0q"  # GemmArguments of router_gemm.cuh, with the padding at its end


def unsupported(hidden_size: int) -> str | None:
    """None, or the reason why the kernel cannot take such a K."""
    return None if hidden_size % 8 == 0 else f"K = {hidden_size} is not a multiple of 8, which a lane loads at once"


def warn_if_unsupported(hidden_size: int) -> None:
    """Says once that PyTorch's product runs in the kernel's place, if it does."""
    reason = unsupported(hidden_size)
    if reason is not None:
        warn_once(f"{reason}: PyTorch's matrix product takes the kernel's place")


class GemmKernels:
    """The kernels for one shape and set of dtypes, loaded for a device; `gemm_kernels` makes them."""

    def __init__(
        self,
        hidden_size: int,
        rows: int,
        dtypes: GemmDtypes,
        norm_eps: float | None,
        device: torch.device,
        *,
        frozen: bool,
        pdl: bool,
        arch: str | None = None,
    ) -> None:
        assert unsupported(hidden_size) is None
        operand_parts = parts(dtypes.hidden, dtypes.weight, norm_eps is not None)[:2]
        chip = chip_of(device, arch)
        plan = plan_gemm(hidden_size, rows, operand_parts, chip)
        module = jit.load(gemm_source(hidden_size, rows, dtypes, norm_eps, plan, frozen=frozen), device, arch)
        self._chip, self._plan = chip, plan
        cuts = (cut_tokens(tokens, plan, chip) for tokens in range(TOKENS_OF_TILE, MAX_GEMM_TOKENS + 1, TOKENS_OF_TILE))
        self._kernels = {
            (tiles, is_alone): module.kernel(
                f"gemm_{tiles}",
                _FIELDS,
                32 * plan.warps,
                cluster=plan.split,
                shared_bytes=bytes_of_block(tiles, plan, chip, is_alone=is_alone),
                pdl=pdl,
            )
            for tiles, is_alone in dict.fromkeys((cut.tiles, cut.is_alone) for cut in cuts)
        }
        self._launches: dict[int, tuple[jit.Kernel, tuple[int, int]]] = {}

    def _launch_of(self, num_tokens: int) -> tuple[jit.Kernel, tuple[int, int]]:
        """The kernel and its grid, found out once for each number of tokens."""
        cut = cut_tokens(num_tokens, self._plan, self._chip)
        kernel = self._kernels[cut.tiles, cut.is_alone]
        found = self._launches[num_tokens] = kernel, (self._plan.row_blocks, cut.groups)
        return found

    def launch(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        logits: Tensor,
        num_tokens: int,
        stream: int,
    ) -> None:
        """[M, K] and [R, K] -> logits [M, R], written on the stream; M is from 1 to `MAX_GEMM_TOKENS`."""
        # stride()[0], not stride(0): a getter without arguments takes the host two thirds of the time.
        source, stride = hidden.data_ptr(), hidden.stride()[0]
        rows, row_stride = weight.data_ptr(), weight.stride()[0]
        if not are_surely_aligned(source | rows, stride | row_stride):
            hidden, weight = aligned_rows(hidden, "hidden"), aligned_rows(weight, "weight")
            source, stride = hidden.data_ptr(), hidden.stride(0)
            rows, row_stride = weight.data_ptr(), weight.stride(0)
        kernel, grid = self._launches.get(num_tokens) or self._launch_of(num_tokens)
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


gemm_kernels = cache(GemmKernels)


@cache
def chip_of(device: torch.device, arch: str | None = None) -> Chip:
    """The chip that kernels for `arch`, the device's own by default, are planned for."""
    arch = arch or jit.arch_of(torch.cuda.get_device_capability(device))
    found = torch.cuda.get_device_properties(device)
    shared_bytes_of_block: int = found.shared_memory_per_block_optin  # type: ignore[attr-defined] # its stub lacks it
    return Chip(found.multi_processor_count, jit.has_clusters_and_pdl(arch), shared_bytes_of_block)
