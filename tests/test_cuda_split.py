"""Float32 weights behind cuBLAS: taken apart into bfloat16 numbers, and their products summed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from cuda_kernels import assert_same_bits, copy_of, gate_on_gpu, problems_of, random_hidden, run
from routers import tensors_of

from moegate import RouterSpec
from moegate.backends.cuda import CudaBackend, split
from moegate.backends.cuda.router import CudaRouter
from moegate.choice import planned

pytestmark = pytest.mark.gpu

MINIMAX = RouterSpec(3072, 256, 8, "sigmoid", "score", renormalize=True, weight_dtype="float32")
SHAPES = {
    "minimax-m2": MINIMAX,
    "odd": RouterSpec(1000, 7, 5, "sigmoid", renormalize=True, weight_dtype="float32"),
    "bias": RouterSpec(2880, 33, 4, "identity", weights_from="softmax_of_selected", linear_bias=True),
    "bfloat16 logits": dataclasses.replace(MINIMAX, logits_dtype="bfloat16"),
    "many rows": RouterSpec(6144, 768, 12, correction_bias="score", weight_dtype="float32"),
}


@pytest.fixture(autouse=True)
def cublas_beyond_64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a table says of router_gemm."""
    monkeypatch.setattr(planned, "gemm_tokens", lambda facts: 64)
    planned.planned.cache_clear()
    yield
    planned.planned.cache_clear()


@pytest.mark.parametrize("rows", [65, 257, 3000])
@pytest.mark.parametrize("name", SHAPES)
def test_the_contract_is_kept(name: str, rows: int) -> None:
    spec = SHAPES[name]
    hidden = random_hidden(spec, rows)
    safe, frozen = (gate_on_gpu(spec, torch.float32, frozen=frozen) for frozen in (False, True))
    expected = run(safe, hidden)
    assert problems_of(expected, hidden, safe.weight, spec, tensors_of(spec)) == []
    for gate in (frozen, gate_on_gpu(spec, torch.float32, pdl=False)):
        assert isinstance(gate._prepared, CudaRouter)
        assert gate._prepared._split_by_dtype
        assert_same_bits(run(gate, hidden), expected)
    out = copy_of(expected)
    for part in out:
        if part is not None:
            part.fill_(-1)
    assert_same_bits(safe(hidden, return_logits=True, out=out), expected)


def test_weights_of_all_magnitudes() -> None:
    """Parts that are far below what their neighbours are, and rows that do not start at 16 bytes."""
    spec = SHAPES["minimax-m2"]
    hidden = random_hidden(spec, 300)
    gate = gate_on_gpu(spec, frozen=False)
    with torch.no_grad():
        gate.weight.mul_(torch.logspace(-12, 6, spec.hidden_size, device="cuda"))
        gate.weight[::3] *= -1e-20
    assert problems_of(run(gate, hidden), hidden, gate.weight, spec, tensors_of(spec)) == []


@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.float32], ids=str)
def test_other_hidden_states_take_the_plain_product(hidden_dtype: torch.dtype) -> None:
    assert split.unsupported(hidden_dtype, torch.float32, None) is not None
    hidden = random_hidden(MINIMAX, 300, hidden_dtype)
    gate = gate_on_gpu(MINIMAX)
    assert problems_of(run(gate, hidden), hidden, gate.weight, MINIMAX, tensors_of(MINIMAX)) == []


def test_captured_in_a_graph() -> None:
    gate, hidden = gate_on_gpu(MINIMAX), random_hidden(MINIMAX, 300)
    expected = run(gate, hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(gate, hidden)
    for seed in (7, 8):
        hidden.copy_(random_hidden(MINIMAX, 300, seed=seed))
        expected = run(gate, hidden)
        graph.replay()
        assert_same_bits(captured, expected)


def test_the_backend_without_a_gate() -> None:
    hidden, gate = random_hidden(MINIMAX, 100), gate_on_gpu(MINIMAX)
    weight, tensors = gate._tensors()
    got = CudaBackend().route(hidden, weight, MINIMAX, tensors, None, None)
    assert_same_bits(got, run(gate, hidden))
