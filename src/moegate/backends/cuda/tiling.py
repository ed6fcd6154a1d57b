"""How a product is cut into blocks, warps and steps, or shares: from shapes and the chip alone, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROWS_OF_TILE = 16
TOKENS_OF_TILE = 8
COLUMNS_OF_STEP = 32
_FEW_WARPS = 16
_STEPS_AT_ONCE = 4  # of a warp, for which it has registers
_TOKEN_PITCH = 20  # RouterGemm::kPitch, and the most of kSums
_MOST_SHARES, _LEAST_SHARE, _STEP_OF_TILE, _NUMBERS_OF_SM = 8, 256, 64, 6144  # of `shares_of_product`
MAX_DECODE_TOKENS = 64
"""Up to so many tokens router_gemm runs in any case, so that a token's bits do not depend on their number."""
MAX_GEMM_TOKENS = 1024
"""Up to so many tokens it can be chosen, where it is known to be faster than cuBLAS."""


@dataclass(frozen=True)
class Chip:
    """What a plan needs to know of a GPU."""

    num_sms: int
    has_clusters: bool
    shared_bytes: int
    """The most that a block can have of shared memory."""


@dataclass(frozen=True)
class GemmPlan:
    """Who sums what. Nothing here depends on the number of tokens, so that their sums do not either."""

    row_blocks: int
    """Tiles of 16 rows of the weight times `split`: the blocks that a group of tokens takes."""
    split: int
    """Blocks, which form a cluster, share K."""
    warps: int
    """Warps share a block's part of K."""
    steps: int
    """Steps of 32 columns make a warp's part."""
    is_light: bool
    """A warp has one step of plain operands, so that several blocks have registers on a multiprocessor."""
    ahead: dict[int, int]
    """How many tiles of 8 tokens a block can own, a kernel each: with so many steps of a warp loaded at once, those
    of a frozen weight before the wait."""


def plan_gemm(hidden_size: int, rows: int, operand_parts: tuple[int, int], chip: Chip) -> GemmPlan:
    """The plan for a weight [rows, hidden_size]; see `parts`.

    Latency wants many blocks, and in each of them many warps with little to do: reading the weight is
    all there is, and a warp's loads are to be in flight at once.
    """
    row_tiles = -(-rows // ROWS_OF_TILE)
    steps = -(-hidden_size // COLUMNS_OF_STEP)
    split = 1
    # Fewer than 128 blocks, on any chip: some multiprocessors are left to the kernels beside this one.
    most_blocks = min(127, chip.num_sms)
    while chip.has_clusters and split < 8 and 2 * split * row_tiles <= most_blocks and steps >= 8 * split:
        split *= 2
    warps, steps_of_warp = _warps_and_steps(-(-steps // split), operand_parts, chip)
    ahead = {
        tiles: count
        for tiles, count in _steps_ahead(warps, steps_of_warp, operand_parts, chip).items()
        if shared_bytes(split, warps, tiles) <= chip.shared_bytes
    }
    is_light = _is_light(operand_parts, chip) and steps_of_warp == 1
    return GemmPlan(row_tiles * split, split, warps, steps_of_warp, is_light, ahead)


def _is_light(operand_parts: tuple[int, int], chip: Chip) -> bool:
    """True if a warp has registers for several steps: operands of several parts take several times as many."""
    return max(operand_parts) == 1 and chip.has_clusters


def _warps_and_steps(steps_of_block: int, operand_parts: tuple[int, int], chip: Chip) -> tuple[int, int]:
    """How many warps share a block's steps, and how many steps make the part of one."""
    most_warps = _FEW_WARPS
    if _is_light(operand_parts, chip) and steps_of_block > most_warps * _STEPS_AT_ONCE:
        most_warps = 28  # more have too few registers each
    steps_of_warp = -(-steps_of_block // most_warps)
    return -(-steps_of_block // steps_of_warp), steps_of_warp


def _steps_ahead(warps: int, steps_of_warp: int, operand_parts: tuple[int, int], chip: Chip) -> dict[int, int]:
    """`GemmPlan.ahead`, as far as registers decide."""
    if _is_light(operand_parts, chip) and steps_of_warp <= _STEPS_AT_ONCE:
        return dict.fromkeys((1, 2, 4, 8) if warps <= _FEW_WARPS else (1, 2, 4), steps_of_warp)
    # A warp that comes back for further steps keeps the sums of all its tokens meanwhile.
    is_loop = not chip.has_clusters or steps_of_warp > _STEPS_AT_ONCE
    is_plain = max(operand_parts) == 1
    halvings = is_loop + (warps > _FEW_WARPS)  # many warps have few registers each
    most_tiles = (2 if operand_parts[0] == 3 else 8 if is_plain else 4) >> halvings
    most_ahead = {1: 2, 2: 2, 4: 2 if is_plain else 1}
    return {tiles: min(steps_of_warp, count) for tiles, count in most_ahead.items() if tiles <= most_tiles}


def shared_bytes(split: int, warps: int, token_tiles: int) -> int:
    """What `run` in router_gemm.cuh lays out: the sums of a block's warps, of a cluster's blocks, and a barrier."""
    tokens = TOKENS_OF_TILE * token_tiles
    return 4 * (warps * (tokens * _TOKEN_PITCH + 8) + split * tokens * _TOKEN_PITCH) + 8


@dataclass(frozen=True)
class Cut:
    """How the blocks of a launch share its tokens."""

    tiles: int
    """Tiles of 8 tokens to a block."""
    groups: int
    """So many blocks for each of the plan's row blocks."""
    is_alone: bool
    """A block has a multiprocessor to itself.

    Otherwise, where kernels start early, the product of the next layer starts beside this one as far as there is room,
    and its loads are in the way of this layer's selection. For one tile the selection itself keeps the next layer back
    (`CudaRouter.route`): being alone was the fastest on one H100, and on another now the fastest and now the slowest.
    """


def cut_tokens(num_tokens: int, plan: GemmPlan, chip: Chip) -> Cut:
    """How a launch of so many tokens is cut.

    Blocks of their own for further tokens read the weight again, but each has less to do. They pay where all of a
    launch are on the chip at once beside the kernel in front: clusters of more than two blocks find their
    multiprocessors there up to half of the chip, others up to all of it.
    """
    tiles_in_all = -(-num_tokens // TOKENS_OF_TILE)
    room = chip.num_sms if plan.split <= 2 else chip.num_sms // 2
    for tiles in plan.ahead:
        groups = -(-tiles_in_all // tiles)
        if groups == 1 or (tiles > 1 and groups * plan.row_blocks <= room):
            return Cut(tiles, groups, tiles > 1)
    # More than the chip holds at once: blocks light enough to share a multiprocessor, or as few as possible.
    tiles = min(2, max(plan.ahead)) if plan.is_light else max(plan.ahead)
    return Cut(tiles, -(-tiles_in_all // tiles), not plan.is_light)


def bytes_of_block(tiles: int, plan: GemmPlan, chip: Chip, *, is_alone: bool) -> int:
    """A block's shared memory: more than it uses, where that keeps other blocks away."""
    used = shared_bytes(plan.split, plan.warps, tiles)
    return max(used, chip.shared_bytes // 2 + 1024) if is_alone and chip.has_clusters else used


def shares_of_product(num_tokens: int, columns: int, hidden_size: int, num_sms: int) -> int:
    """Into how many shares of K cuBLAS's product [num_tokens, columns] is cut.

    As many as give a multiprocessor no more than a few thousand numbers to write, which are read again to be added up;
    of at least 256 of K each, and whole steps of cuBLAS's tiles. Measured on an H100 (docs/cuda.md).
    """
    most = min(_MOST_SHARES, hidden_size // _LEAST_SHARE, _NUMBERS_OF_SM * num_sms // (num_tokens * columns))
    return next((count for count in range(most, 1, -1) if hidden_size % (count * _STEP_OF_TILE) == 0), 1)


def parts(hidden: torch.dtype, weight: torch.dtype, norm: bool) -> tuple[int, int, bool]:
    """Of how many 16-bit numbers a hidden element and a weight are the sum, and whether these are float16."""
    if hidden == weight == torch.float16 and not norm:
        return 1, 1, True
    of_dtype = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
    return 3 if norm else of_dtype[hidden], of_dtype[weight], False
