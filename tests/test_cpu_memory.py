"""Temporary memory on a CPU is bounded, whatever the number of tokens, and however often the number changes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from routers import generator

from moegate import Gate, RouterSpec, Routing, chunks, router_gemm, select
from moegate.synthetic import random_gate, random_hidden, random_input_ids

pytestmark = pytest.mark.cpu

_GROWTH = """
import sys, torch
from moegate import Gate, RouterSpec
def resident():
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmRSS"))
spec = RouterSpec({size}, 8, logits_dtype={dtype!r})
gate = Gate(spec, torch.randn({rows}, {columns}).bfloat16(), frozen={frozen})
hidden = torch.randn(2000, {columns}).bfloat16()
gate(hidden[:1])
before = resident()
for num_tokens in range(1, 2001):
    gate(hidden[:num_tokens])
print(resident() - before)
"""
_PEAK = """
import resource, torch
from moegate import RouterSpec
from moegate.synthetic import random_gate
spec = RouterSpec({size}, 8, {more})
gate = random_gate(spec)
hidden = torch.zeros({tokens}, {columns}, dtype=torch.bfloat16)
hidden[:, ::7] = 0.01
gate(hidden[:600])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gate(hidden)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory in use")


def megabytes(code: str) -> float:
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # least sensitive to other load on the machine
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=one_thread)
    return float(done.stdout)


@linux
@pytest.mark.parametrize(
    ("columns", "rows", "logits_dtype", "frozen"),
    [
        (1024, 64, "float32", True),
        (1024, 64, "bfloat16", True),
        (512, 32, "float32", True),
        (512, 32, "bfloat16", True),
        (512, 32, "bfloat16", False),  # PyTorch's own GEMM uses oneDNN, too
    ],
)
def test_every_number_of_tokens_leaves_little_behind(columns: int, rows: int, logits_dtype: str, frozen: bool) -> None:
    """Without chunks, the code that oneDNN caches for each number of rows is 774 to 2978 MB (docs/cpu.md)."""
    code = _GROWTH.format(size=f"{columns}, {rows}", columns=columns, rows=rows, dtype=logits_dtype, frozen=frozen)
    assert megabytes(code) < 50


@linux
@pytest.mark.parametrize(
    ("columns", "rows", "more"),
    [
        (7168, 256, "'sigmoid', 'score', 8, 4, 'top2_sum'"),
        (2048, 128, "logits_dtype='bfloat16'"),
        (2816, 128, "input_norm_eps=1e-6"),
    ],
)
def test_many_hidden_states_are_routed_in_half_their_size(columns: int, rows: int, more: str) -> None:
    """Hidden states of 400 MB; the process may grow by half of that and 64 MB for the temporaries of a chunk."""
    tokens = 400 * 2**20 // (2 * columns)
    grown = megabytes(_PEAK.format(size=f"{columns}, {rows}", columns=columns, tokens=tokens, more=more))
    assert grown < 200 + 64


@pytest.mark.parametrize("num_rows", [*range(1, 600), 1999, 2000, 4097, 100_001])
def test_gemms_meet_few_numbers_of_rows(num_rows: int) -> None:
    met: list[int] = []

    def gemm(chunk: torch.Tensor) -> torch.Tensor:
        met.append(len(chunk))
        return chunk * 2

    rows = torch.arange(float(num_rows)).unsqueeze(1)
    assert chunks.in_sizes(rows, gemm).equal(rows * 2)
    assert set(met) <= set(chunks._SIZES)
    assert len(chunks._SIZES) <= 40


def routed(gate: Gate, hidden: torch.Tensor, input_ids: torch.Tensor | None) -> Routing:
    return gate(hidden, input_ids=input_ids, return_logits=True)  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("num_tokens", [513, 529, 1040, 1041])
@pytest.mark.parametrize(
    "spec",
    [
        RouterSpec(64, 32, 4, "sigmoid", "score", renormalize=True, num_zero_experts=4),
        RouterSpec(64, 32, 4, "sigmoid", renormalize=True, num_shared_gates=2, logits_dtype="bfloat16"),
        RouterSpec(64, 32, 4, "sqrtsoftplus", hash_routing=True),
    ],
    ids=["zero experts", "shared gates", "hash"],
)
def test_chunks_give_the_routing_of_all_rows_at_once(
    spec: RouterSpec, num_tokens: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tensors of a routing in chunks equal those of a selection of the same logits at once."""
    seeded = random_gate(spec)
    given = {name: value for name, value in seeded.named_parameters() if name != "weight"} | dict(
        seeded.named_buffers()
    )
    gate = Gate(spec, seeded.weight, **given, frozen=frozen)  # type: ignore[arg-type]
    hidden = random_hidden(spec, num_tokens)
    hidden[[0, 511, 512, num_tokens - 1]] = torch.nan
    ids = random_input_ids(num_tokens, 0, vocabulary=len(gate.get_buffer("tid2eid"))) if spec.hash_routing else None
    whole = routed(gate, hidden, ids)
    monkeypatch.setattr(chunks, "_NUMBERS", 1)  # chunks of 512 rows
    cut = routed(gate, hidden, ids)
    out = Routing(*(None if part is None else torch.empty_like(part) for part in cut))  # type: ignore[arg-type]
    for routing in (cut, gate(hidden, input_ids=ids, out=out, return_logits=True)):
        for mine, theirs in zip(routing, whole, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                assert mine.dtype == theirs.dtype
                # oneDNN's GEMMs of other numbers of rows add up in another order: 4 ulp at these sizes.
                rounding = 2**-7 if mine.dtype == torch.bfloat16 else 2**-20
                assert torch.allclose(mine.float(), theirs.float(), rtol=rounding, atol=2**-20, equal_nan=True)


def test_select_in_chunks_has_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RouterSpec(64, 48, 6, "sigmoid", "score", n_group=4, topk_group=2, group_score="top2_sum", renormalize=True)
    logits = torch.randn(1600, 48, generator=generator(0))
    logits[700, 3], logits[1599, 0] = torch.nan, torch.inf
    bias = torch.randn(48, generator=generator(1))
    whole = select(logits, spec, e_score_correction_bias=bias)
    monkeypatch.setattr(chunks, "_NUMBERS", 1)
    cut = select(logits, spec, e_score_correction_bias=bias)
    assert cut.topk_ids.equal(whole.topk_ids)
    assert cut.topk_weights.view(torch.int32).equal(whole.topk_weights.view(torch.int32))


def test_router_gemm_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = torch.randn(1111, 64, generator=generator(0)).bfloat16()
    weight = torch.randn(16, 64, generator=generator(1)).bfloat16()
    monkeypatch.setattr(chunks, "_NUMBERS", 1)
    exact = hidden.double() @ weight.double().T
    # 64 products of about 1 in float32, whose unit roundoff is 2**-24.
    assert torch.allclose(router_gemm(hidden, weight).double(), exact, rtol=0, atol=64 * 2**-22)
