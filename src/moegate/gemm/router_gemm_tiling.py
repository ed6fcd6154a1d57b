"""How router_gemm.cuh is tiled into blocks, warps and steps: from shapes and the chip alone, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegate.cuda.device import Chip

ROWS_OF_TILE = 16
TOKENS_OF_TILE = 8
COLUMNS_OF_STEP = 32
_FEW_WARPS = 16
_STEPS_AT_ONCE = 4  # of a warp, for which it has registers
TOKEN_PITCH = 20
"""Numbers from token to token among the sums in shared memory."""
MAX_GEMM_TOKENS = 1024
"""Up to so many tokens it can be chosen, where it is known to be faster than cuBLAS."""


@dataclass(frozen=True)
class Tiling:
    """Who sums what. Nothing here depends on the number of tokens, so that their sums do not either."""

    row_blocks: int
    """Tiles of 16 rows of the weight times `num_splits`: the blocks that a token group takes."""
    num_splits: int
    """The blocks of a cluster, each of which has a slice of K."""
    warps: int
    """The warps of a block, each of which has a part of the block's slice of K."""
    steps: int
    """Steps of 32 columns make a warp's part."""
    is_light: bool
    """A warp has one step of plain operands, so that several blocks have registers on a multiprocessor."""
    ahead: dict[int, int]
    """How many tiles of 8 tokens a block can own, a kernel each: with so many steps of a warp loaded at once, those
    of a frozen weight before the wait."""


def tiling_of(hidden_size: int, rows: int, num_terms: tuple[int, int], chip: Chip) -> Tiling:
    """The tiling for a weight [rows, hidden_size]; see `terms_of`.

    Latency wants many blocks, and in each of them many warps with little to do: reading the weight is
    all there is, and a warp's loads are to be in flight at once.
    """
    row_tiles = -(-rows // ROWS_OF_TILE)
    steps = -(-hidden_size // COLUMNS_OF_STEP)
    num_splits = 1
    # Fewer than 128 blocks, on any chip: some multiprocessors are left to the kernels beside this one.
    most_blocks = min(127, chip.num_sms)
    most_splits = min(8, steps // 4) if chip.has_clusters else 1
    while 2 * num_splits <= most_splits and 2 * num_splits * row_tiles <= most_blocks:
        num_splits *= 2
    warps, steps_of_warp = _warps_and_steps(-(-steps // num_splits), num_terms, chip)
    ahead = {
        tiles: count
        for tiles, count in _steps_ahead(warps, steps_of_warp, num_terms, chip).items()
        if shared_bytes(num_splits, warps, tiles) <= chip.shared_bytes
    }
    is_light = _is_light(num_terms, chip) and steps_of_warp == 1
    return Tiling(row_tiles * num_splits, num_splits, warps, steps_of_warp, is_light, ahead)


def _is_light(num_terms: tuple[int, int], chip: Chip) -> bool:
    """True if a warp has registers for several steps: operands of several terms take several times as many."""
    return max(num_terms) == 1 and chip.has_clusters


def _warps_and_steps(steps_of_block: int, num_terms: tuple[int, int], chip: Chip) -> tuple[int, int]:
    """How many warps share a block's steps, and how many steps make the part of one."""
    most_warps = _FEW_WARPS
    if _is_light(num_terms, chip) and steps_of_block > most_warps * _STEPS_AT_ONCE:
        most_warps = 28  # more have too few registers each
    steps_of_warp = -(-steps_of_block // most_warps)
    return -(-steps_of_block // steps_of_warp), steps_of_warp


def _steps_ahead(warps: int, steps_of_warp: int, num_terms: tuple[int, int], chip: Chip) -> dict[int, int]:
    """`Tiling.ahead`, as far as registers decide."""
    if _is_light(num_terms, chip) and steps_of_warp <= _STEPS_AT_ONCE:
        return dict.fromkeys((1, 2, 4, 8) if warps <= _FEW_WARPS else (1, 2, 4), steps_of_warp)
    # A warp that comes back for further steps keeps the sums of all its tokens meanwhile.
    is_loop = not chip.has_clusters or steps_of_warp > _STEPS_AT_ONCE
    is_plain = max(num_terms) == 1
    halvings = is_loop + (warps > _FEW_WARPS)  # many warps have few registers each
    most_tiles = (2 if num_terms[0] == 3 else 8 if is_plain else 4) >> halvings
    most_ahead = {1: 2, 2: 2, 4: 2 if is_plain else 1}
    return {tiles: min(steps_of_warp, count) for tiles, count in most_ahead.items() if tiles <= most_tiles}


def warp_pitch(token_tiles: int) -> int:
    """Numbers from warp to warp among the sums in shared memory."""
    return TOKENS_OF_TILE * token_tiles * TOKEN_PITCH + 8


def shared_bytes(num_splits: int, warps: int, token_tiles: int) -> int:
    """For what `run` in router_gemm.cuh lays out: the sums of a block's warps, of a cluster's blocks, and a barrier."""
    of_cluster = num_splits * TOKENS_OF_TILE * token_tiles * TOKEN_PITCH
    return 4 * (warps * warp_pitch(token_tiles) + of_cluster) + 8


@dataclass(frozen=True)
class Cut:
    """How the blocks of a launch share its tokens."""

    tiles: int
    """Tiles of 8 tokens to a block."""
    token_groups: int
    """So many blocks for each of the tiling's row blocks."""
    is_alone: bool
    """A block has a multiprocessor to itself.

    Without that, PDL lets the next layer's GEMM start beside this one and compete with this layer's selection for
    bandwidth. For one token tile the selection holds dependents back instead (`holds_dependents_to`): multiprocessors
    of their own were the fastest on one H100, and bistable on another.
    """


def cut_tokens(num_tokens: int, tiling: Tiling, chip: Chip) -> Cut:
    """How a launch of so many tokens is cut.

    Blocks of their own for further tokens read the weight again, but each has less to do. They pay where all of a
    launch are on the chip at once beside the kernel in front: clusters of more than two blocks find their
    multiprocessors there up to half of the chip, others up to all of it.
    """
    tiles_in_all = -(-num_tokens // TOKENS_OF_TILE)
    room = chip.num_sms if tiling.num_splits <= 2 else chip.num_sms // 2
    for tiles in tiling.ahead:
        token_groups = -(-tiles_in_all // tiles)
        if token_groups == 1 or (tiles > 1 and token_groups * tiling.row_blocks <= room):
            return Cut(tiles, token_groups, tiles > 1)
    # More than the chip holds at once: blocks light enough to share a multiprocessor, or as few as possible.
    tiles = min(2, max(tiling.ahead)) if tiling.is_light else max(tiling.ahead)
    return Cut(tiles, -(-tiles_in_all // tiles), not tiling.is_light)


def bytes_of_block(tiles: int, tiling: Tiling, chip: Chip, *, is_alone: bool) -> int:
    """A block's shared memory: more than it uses, where that keeps other blocks away."""
    used = shared_bytes(tiling.num_splits, tiling.warps, tiles)
    return max(used, chip.shared_bytes // 2 + 1024) if is_alone and chip.has_clusters else used


def terms_of(hidden_dtype: torch.dtype, weight_dtype: torch.dtype, *, has_norm: bool) -> tuple[int, int, bool]:
    """The numbers of 16-bit terms whose sum a hidden element and a weight are; and whether the terms are float16."""
    if hidden_dtype == weight_dtype == torch.float16 and not has_norm:
        return 1, 1, True
    of_dtype = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
    return 3 if has_norm else of_dtype[hidden_dtype], of_dtype[weight_dtype], False
