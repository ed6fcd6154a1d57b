"""The tiling and the split-K of GEMMs for every chip; no GPU is needed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moegate.cuda.device import Chip
from moegate.gemm.cublas import num_splits_of
from moegate.gemm.router_gemm_tiling import (
    COLUMNS_OF_STEP,
    MAX_GEMM_TOKENS,
    TOKENS_OF_TILE,
    Cut,
    bytes_of_block,
    cut_tokens,
    shared_bytes,
    terms_of,
    tiling_of,
)

pytestmark = pytest.mark.cpu

DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@given(
    steps_of_lane=st.integers(1, 4096),
    rows=st.integers(1, 1024),
    hidden_dtype=DTYPES,
    weight_dtype=DTYPES,
    norm=st.booleans(),
    chip=st.builds(Chip, st.integers(1, 200), st.booleans(), st.sampled_from([99 * 1024, 163 * 1024, 227 * 1024])),
)
def test_tilings(
    steps_of_lane: int, rows: int, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, norm: bool, chip: Chip
) -> None:
    """Every row of the weight belongs to a block, and blocks and clusters fit the chip."""
    tiling = tiling_of(8 * steps_of_lane, rows, terms_of(hidden_dtype, weight_dtype, has_norm=norm)[:2], chip)
    assert tiling.num_splits * tiling.warps * tiling.steps * COLUMNS_OF_STEP >= 8 * steps_of_lane
    assert tiling.num_splits in (1, 2, 4, 8)
    assert chip.has_clusters or tiling.num_splits == 1
    assert 32 <= 32 * tiling.warps <= 1024
    assert all(1 <= ahead <= tiling.steps for ahead in tiling.ahead.values())
    assert all(shared_bytes(tiling.num_splits, tiling.warps, tiles) <= chip.shared_bytes for tiles in tiling.ahead)
    assert min(tiling.ahead) == 1
    assert list(tiling.ahead) == sorted(tiling.ahead)


@given(
    hidden_size=st.integers(1, 2048).map(lambda vecs: 8 * vecs),
    rows=st.integers(1, 1024),
    weight_dtype=DTYPES,
    chip=st.builds(Chip, st.integers(1, 200), st.booleans(), st.sampled_from([99 * 1024, 163 * 1024, 227 * 1024])),
    tokens=st.integers(1, MAX_GEMM_TOKENS),
)
def test_every_token_has_a_block(
    hidden_size: int, rows: int, weight_dtype: torch.dtype, chip: Chip, tokens: int
) -> None:
    """Each token is in one block, blocks fit the chip and have kernels; few tokens are in one block."""
    tiling = tiling_of(hidden_size, rows, terms_of(torch.bfloat16, weight_dtype, has_norm=False)[:2], chip)
    cut = cut_tokens(tokens, tiling, chip)
    assert cut.tiles in tiling.ahead
    of_block = TOKENS_OF_TILE * cut.tiles
    assert of_block * (cut.token_groups - 1) < tokens <= of_block * cut.token_groups
    assert bytes_of_block(cut.tiles, tiling, chip, is_alone=cut.is_alone) <= chip.shared_bytes
    assert tokens > TOKENS_OF_TILE or cut == Cut(1, 1, False)


H100 = Chip(132, True, 227 << 10)


@pytest.mark.parametrize(
    ("hidden_size", "rows", "tokens", "cut"),
    [
        (7168, 256, 16, Cut(2, 1, True)),
        (7168, 256, 64, Cut(8, 1, True)),
        (4096, 8, 64, Cut(2, 4, True)),  # few rows: 32 blocks of 16 tokens instead of 8 blocks of 64
        (5376, 64, 64, Cut(4, 2, True)),
        (2048, 512, 64, Cut(4, 2, True)),  # clusters of two
        (2880, 128, 128, Cut(2, 8, False)),  # several small blocks a multiprocessor
        (7168, 256, 128, Cut(8, 2, True)),
    ],
)
def test_tokens_are_cut_as_was_fastest_on_an_h100(hidden_size: int, rows: int, tokens: int, cut: Cut) -> None:
    assert cut_tokens(tokens, tiling_of(hidden_size, rows, (1, 1), H100), H100) == cut


@pytest.mark.parametrize(
    ("tokens", "columns", "hidden_size", "num_splits"),
    [
        (128, 256, 7168, 8),
        (512, 256, 7168, 4),
        (1024, 256, 7168, 2),
        (4096, 256, 7168, 1),
        (512, 128, 2880, 5),  # 6, 7 and 8 splits would not be multiples of 64
        (256, 768, 3072, 4),
        (65, 8, 384, 1),  # two splits would have 192 columns of K, which are fewer than 256
        (65, 8, 448, 1),  # half of K would be no whole number of steps
        (65, 8, 512, 2),
        (65, 8, 1000, 1),
    ],
)
def test_k_is_split_as_was_fastest_on_an_h100(tokens: int, columns: int, hidden_size: int, num_splits: int) -> None:
    assert num_splits_of(tokens, columns, hidden_size, H100.num_sms) == num_splits


def test_a_chip_with_little_shared_memory_gets_smaller_blocks() -> None:
    large, small = (tiling_of(8192, 256, (1, 1), Chip(132, True, kib << 10)) for kib in (227, 99))
    assert max(large.ahead) == 8
    assert max(small.ahead) == 4
    assert (small.num_splits, small.warps, small.steps) == (large.num_splits, large.warps, large.steps)
