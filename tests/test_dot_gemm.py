"""The dot products of a float32 weight, without a GPU: what they take, how they are tiled, that no plan runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cost_tables import GPU, MADE
from hypothesis import given
from hypothesis import strategies as st
from machines import CPU
from routers import SPECS

from moegate import RouterSpec, get_spec
from moegate.choice.candidates import DOT_GEMM, ROUTER_GEMM
from moegate.choice.explain import explain
from moegate.choice.plan import Plan
from moegate.choice.tables import Row, Table, shape_of
from moegate.cuda.device import Chip
from moegate.gemm.dot_gemm import MAX_COLUMNS, MAX_DOT_TOKENS, tiling_of
from moegate.machine import Machine
from moegate.problem import problem_of

pytestmark = pytest.mark.cpu

SPEC = RouterSpec(8192, 256, 8)
BREAKS = "breaks a promise: a token's bits would depend on M up to 64"


@given(
    hidden_size=st.integers(1, MAX_COLUMNS // 8).map(lambda vecs: 8 * vecs),
    rows=st.integers(1, 1024),
    num_sms=st.integers(1, 200),
)
def test_every_column_and_row_has_an_owner(hidden_size: int, rows: int, num_sms: int) -> None:
    tiling = tiling_of(hidden_size, rows, Chip(num_sms, True, 227 << 10))
    assert 128 * tiling.warps * tiling.vecs >= hidden_size
    assert 1 <= tiling.warps <= 16
    assert tiling.rows in (1, 2, 4)
    assert tiling.rows * tiling.vecs <= 8
    assert tiling.rows == 1 or (tiling.rows // 2) * num_sms < rows  # no fewer blocks than multiprocessors need
    # The order of the additions, and so the bits, depend on K alone.
    assert replace(tiling, rows=1) == tiling_of(hidden_size, 1, Chip(1, False, 99 << 10))


@pytest.mark.parametrize(
    ("spec", "weight", "tokens", "reason"),
    [
        (SPEC, torch.float32, MAX_DOT_TOKENS, None),
        (SPEC, torch.float32, MAX_DOT_TOKENS + 1, "the GEMM takes up to 4 tokens"),
        (SPEC, torch.bfloat16, 1, "it takes a weight in float32, and this one is in bfloat16"),
        (RouterSpec(16384, 1024, 8), torch.float32, 1, None),
        (RouterSpec(16392, 1024, 8), torch.float32, 1, "K = 16392 is more than the 16384 columns"),
        (RouterSpec(1004, 64, 8), torch.float32, 1, "K = 1004 is not a multiple of 8"),
        (SPECS["input norm and expert scale"], torch.float32, 1, "it has no input norm"),
    ],
)
def test_what_it_takes(spec: RouterSpec, weight: torch.dtype, tokens: int, reason: str | None) -> None:
    found = DOT_GEMM.unsupported(problem_of(GPU, spec, weight), tokens)
    assert (found is None) if reason is None else (found is not None and found.startswith(reason))


def test_it_takes_an_nvidia_gpu() -> None:
    problem = problem_of(Machine("cpu", None, device=CPU), SPEC, torch.float32)
    assert DOT_GEMM.unsupported(problem, 1) == "cpu is no NVIDIA GPU"


@pytest.mark.parametrize("backend", [None, "cuda"])
def test_no_plan_runs_it_however_fast_it_is(shipped: Callable[..., None], backend: str | None) -> None:
    """A token's bits would be others than in a call of five."""
    problem = problem_of(GPU, get_spec("minimax-m2"), torch.float32)
    dot_products, ours = DOT_GEMM.key(problem), ROUTER_GEMM.key(problem)
    assert dot_products == "cuda:dot_gemm+select"
    times = {dot_products: 1.0, ours: 9.0, "torch:mm+ops": 50.0}
    rows = [Row("minimax-m2", shape_of(problem), tokens, times, {}) for tokens in (1, 4, 64)]
    shipped(Table(GPU, dict(MADE), tuple(rows)))
    plan = Plan(problem, backend=backend)
    for tokens in (1, MAX_DOT_TOKENS):
        found = explain(plan, tokens)
        assert found.kernel == "router_gemm+select"
        assert ("bits do not depend on M" if backend is None else "the only one") in found.why
        rejected = next(entry for entry in found.rejected if entry.kernel == "dot_gemm+select")
        assert (rejected.reason, rejected.expected_us) == (BREAKS, 1.0)
    assert all(span.candidate is not DOT_GEMM for span in plan.spans)
