"""How a router GEMM is cut into blocks, warps and steps: from shapes and the chip alone, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ROWS_OF_TILE = 16
TOKENS_OF_TILE = 8
COLUMNS_OF_STEP = 32
MAX_DECODE_TOKENS = 64
"""Up to so many tokens the kernels here run, and a token's bits do not depend on their number."""


@dataclass(frozen=True)
class Chip:
    """What a plan needs to know of a GPU."""

    num_sms: int
    has_clusters: bool


@dataclass(frozen=True)
class GemmPlan:
    """Who sums what. Nothing here depends on the number of tokens, so that their sums do not either."""

    split: int
    """Blocks, which form a cluster, share K."""
    warps: int
    """Warps share a block's part of K."""
    steps: int
    """Steps of 32 columns make a warp's part."""
    ahead: int
    """So many steps of a warp are loaded at once, those of a frozen weight before the wait."""
    token_tiles: tuple[int, ...]
    """How many tiles of 8 tokens a block can own: a kernel each."""


def plan_gemm(hidden_size: int, rows: int, operand_parts: tuple[int, int], chip: Chip) -> GemmPlan:
    """The plan for a weight [rows, hidden_size]; see `parts`.

    Latency wants many blocks, and in each of them many warps with little to do: reading the weight is
    all there is, and every load of a warp is in flight at once.
    """
    tiles = -(-rows // ROWS_OF_TILE)
    steps = -(-hidden_size // COLUMNS_OF_STEP)
    split = 1
    # Fewer than 128 blocks, on any chip: some multiprocessors are left to the kernels beside this one.
    most_blocks = min(127, chip.num_sms)
    while chip.has_clusters and split < 8 and 2 * split * tiles <= most_blocks and steps >= 8 * split:
        split *= 2
    steps_of_block = -(-steps // split)
    # Registers decide the rest: an operand of several parts takes several times as many, a loop some more.
    parts_of_pair = max(operand_parts)
    steps_of_warp = -(-steps_of_block // (20 if parts_of_pair == 1 else 16))
    warps = -(-steps_of_block // steps_of_warp)
    is_loop = steps_of_warp > 4 or not chip.has_clusters
    ahead = min(steps_of_warp, 4 if parts_of_pair == 1 and not is_loop else 2)
    most_tiles = 2 if operand_parts[0] == 3 else 4 if parts_of_pair > 1 or warps > 16 else 8
    tiles_of_block = tuple(count for count in (1, 2, 4, 8) if count <= most_tiles // (2 if is_loop else 1))
    return GemmPlan(split, warps, steps_of_warp, ahead, tiles_of_block)


def token_tiles(num_tokens: int, plan: GemmPlan) -> int:
    """Tiles of 8 tokens in a block: all tokens, as far as possible.

    Blocks of their own for further tokens would read the weight again, and no longer fit on the chip at
    once beside the kernel in front.
    """
    return next((tiles for tiles in plan.token_tiles if num_tokens <= TOKENS_OF_TILE * tiles), plan.token_tiles[-1])


def parts(hidden: torch.dtype, weight: torch.dtype, norm: bool) -> tuple[int, int, bool]:
    """Of how many 16-bit numbers a hidden element and a weight are the sum, and whether these are float16."""
    if hidden == weight == torch.float16 and not norm:
        return 1, 1, True
    of_dtype = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
    return 3 if norm else of_dtype[hidden], of_dtype[weight], False
