"""Equal bits: for a token at any M and among any tokens, in every run, frozen or not, with and without PDL."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_kernels import DEEPSEEK_V3, assert_same_bits, gate_on_gpu, random_hidden, rows_of, run
from machines import router_gemm_up_to
from routers import SPECS

from moegate import RouterSpec
from moegate.gemm.router_gemm_tiling import MAX_GEMM_TOKENS

# M on both sides of each change of kernels, and of a token tile.
ROWS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Small specs, and specs whose K is split over the blocks of a cluster and looped over by each warp.
SHAPES: dict[str, RouterSpec] = {
    **{name: SPECS[name] for name in ("softmax of selected", "sigmoid with bias in groups", "hash", "largest")},
    "input norm": RouterSpec(2816, 128, 8, renormalize=True, input_norm_eps=1e-6, per_expert_scale=True),
    "deepseek-v3": DEEPSEEK_V3,
    "odd": RouterSpec(1000, 258, 6, "sigmoid", "score", renormalize=True),
}


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_a_token_has_the_same_bits_at_every_m(name: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    spec = SHAPES[name]
    hidden = random_hidden(spec, 64, hidden_dtype)
    not_frozen, frozen = (gate_on_gpu(spec, weight_dtype, frozen=frozen) for frozen in (False, True))
    expected = run(not_frozen, hidden)
    assert_same_bits(run(frozen, hidden), expected, "if frozen, at M = 64")
    for rows in ROWS:
        for gate in (not_frozen, frozen):
            got = run(gate, hidden[:rows])
            assert_same_bits(got, rows_of(expected, rows), f"at M = {rows}, frozen = {gate.frozen}")


@pytest.fixture
def router_gemm_as_far_as_it_goes() -> Iterator[None]:
    with router_gemm_up_to(MAX_GEMM_TOKENS):
        yield


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.usefixtures("router_gemm_as_far_as_it_goes")
def test_router_gemm_keeps_them_beyond_64(name: str, frozen: bool) -> None:
    spec = SHAPES[name]
    hidden = random_hidden(spec, MAX_GEMM_TOKENS)
    gate = gate_on_gpu(spec, frozen=frozen)
    by_64 = [run(gate, part).logits for part in hidden.split(64)]
    expected = torch.cat([part for part in by_64 if part is not None])
    for rows in (65, 96, 128, 129, 250, 513, MAX_GEMM_TOKENS):
        logits = run(gate, hidden[:rows]).logits
        assert logits is not None
        assert logits.equal(expected[:rows]), rows


def test_a_token_has_the_same_bits_in_every_place() -> None:
    """At any place among the tokens, whatever the other tokens are."""
    gate, hidden = gate_on_gpu(DEEPSEEK_V3, frozen=True), random_hidden(DEEPSEEK_V3, 64)
    expected = run(gate, hidden)
    for by in (1, 8, 31):
        turned = run(gate, hidden.roll(by, 0))
        for part, whole in zip(turned[:3], expected[:3], strict=True):
            assert part is not None
            assert whole is not None
            assert part.equal(whole.roll(by, 0))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_thousand_runs_have_the_same_bits(frozen: bool) -> None:
    gate, hidden = gate_on_gpu(DEEPSEEK_V3, frozen=frozen), random_hidden(DEEPSEEK_V3, 5)
    expected = run(gate, hidden)
    for at in range(1000):
        assert_same_bits(run(gate, hidden), expected, f"in run {at}")


@pytest.mark.parametrize("frozen", [False, True])  # beyond 64 tokens, the two may use different GEMMs
@pytest.mark.parametrize("rows", [1, 16, 64, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_without_pdl_the_bits_are_the_same(name: str, rows: int, frozen: bool) -> None:
    spec = SHAPES[name]
    hidden = random_hidden(spec, rows)
    expected = run(gate_on_gpu(spec, frozen=frozen), hidden)
    assert_same_bits(run(gate_on_gpu(spec, frozen=frozen, pdl=False), hidden), expected)
