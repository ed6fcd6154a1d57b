"""dot_gemm.cuh on a GPU: the contract, the same bits, nothing beyond its logits, and its place behind a late kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cuda_kernels import (
    a_call,
    assert_same_bits,
    on_gpu,
    problems_of,
    random_hidden,
    random_weight,
    routed_by,
    rows_of,
)
from routers import tensors_of
from torch import Tensor

from moegate import RouterSpec, Routing
from moegate.choice.candidates import DOT_GEMM
from moegate.choice.machines import machine_of
from moegate.contract.verify import verify_logits
from moegate.cuda import device as gpu
from moegate.gemm.dot_gemm import MAX_DOT_TOKENS, BoundDotGemm, tiling_of
from moegate.measure.cuda_kernels import Predecessors
from moegate.problem import Problem, dtypes_of
from moegate.routing import RouterTensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = range(1, MAX_DOT_TOKENS + 1)
# 1, 2 and 4 rows to a block, with and without a rest; 1 to 8 vectors to a thread, the last of which may be beyond K.
SHAPES: dict[str, RouterSpec] = {
    "8192x256": RouterSpec(8192, 256, 8, "sigmoid", "score", renormalize=True),
    "6144x128": RouterSpec(6144, 128, 4, "sigmoid", renormalize=True),
    "3072x256": RouterSpec(3072, 256, 8, renormalize=True),
    "4096x128": RouterSpec(4096, 128, 8),
    "odd": RouterSpec(1000, 259, 6, "sigmoid", "score", renormalize=True),
    "odd with bias": RouterSpec(2888, 37, 4, linear_bias=True),
    "bfloat16 logits": RouterSpec(2880, 257, 4, linear_bias=True, logits_dtype="bfloat16"),
    "many rows": RouterSpec(2048, 1023, 8, linear_bias=True),
    "the widest": RouterSpec(16384, 131, 2),
    "the smallest": RouterSpec(8, 1, 1),
}


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def bound_to(
    spec: RouterSpec,
    hidden_dtype: torch.dtype = torch.bfloat16,
    *,
    bias_dtype: torch.dtype = torch.float32,
    frozen: bool = True,
    pdl: bool = True,
    arch: str | None = None,
) -> BoundDotGemm:
    bias = bias_dtype if spec.linear_bias else None
    dtypes = dtypes_of(spec, torch.float32, tensors_of(spec))._replace(hidden=hidden_dtype, bias=bias)
    problem = Problem(machine_of(device()), spec, dtypes, frozen, pdl)
    tiling = tiling_of(spec.hidden_size, spec.num_gate_rows, gpu.chip_of(device(), arch))
    return BoundDotGemm(problem, tiling, device(), arch)


def given(spec: RouterSpec) -> tuple[Tensor, RouterTensors]:
    return random_weight(spec, torch.float32), on_gpu(tensors_of(spec))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_logits_keep_the_contract(name: str, dtype: torch.dtype, frozen: bool) -> None:
    spec = SHAPES[name]
    bound, (weight, tensors) = bound_to(spec, dtype, frozen=frozen), given(spec)
    for tokens in TOKENS:
        hidden = random_hidden(spec, tokens, dtype, seed=tokens)
        logits = bound(a_call(hidden, weight, tensors))
        assert verify_logits(logits, hidden, weight, spec, tensors).problems == []


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["odd with bias", "bfloat16 logits"])
def test_a_bias_in_any_dtype(name: str, dtype: torch.dtype) -> None:
    spec = SHAPES[name]
    bound, (weight, tensors) = bound_to(spec, bias_dtype=dtype), given(spec)
    assert tensors.bias is not None
    tensors = tensors._replace(bias=tensors.bias.to(dtype))
    torch.cuda.synchronize()  # a frozen gate's bias was made long ago
    for tokens in TOKENS:
        hidden = random_hidden(spec, tokens)
        assert verify_logits(bound(a_call(hidden, weight, tensors)), hidden, weight, spec, tensors).problems == []


@pytest.mark.parametrize("name", SHAPES)
def test_routes_keep_the_contract(name: str) -> None:
    spec = SHAPES[name]
    weight, tensors = given(spec)
    for tokens in TOKENS:
        hidden = random_hidden(spec, tokens)
        routing = routed_by(DOT_GEMM, hidden, weight, spec, tensors)
        assert problems_of(routing, hidden, weight, spec, tensors) == []


@pytest.mark.parametrize("arch", ["compute_80", "compute_90"])
@pytest.mark.parametrize("name", SHAPES)
def test_from_ptx_it_keeps_the_contract(name: str, arch: str) -> None:
    spec = SHAPES[name]
    # compute_80 knows no wait for a predecessor
    bound, (weight, tensors) = bound_to(spec, arch=arch, pdl=arch == "compute_90"), given(spec)
    for tokens in TOKENS:
        hidden = random_hidden(spec, tokens)
        assert verify_logits(bound(a_call(hidden, weight, tensors)), hidden, weight, spec, tensors).problems == []


@pytest.mark.parametrize("name", SHAPES)
def test_a_token_has_the_same_bits_in_every_call(name: str) -> None:
    """Whatever comes with it, frozen or not, with and without PDL."""
    spec = SHAPES[name]
    weight, tensors = given(spec)
    hidden = random_hidden(spec, MAX_DOT_TOKENS)
    expected = bound_to(spec)(a_call(hidden, weight, tensors))
    for frozen, pdl in ((True, True), (False, True), (True, False), (False, False)):
        bound = bound_to(spec, frozen=frozen, pdl=pdl)
        for tokens in TOKENS:
            assert bound(a_call(hidden[:tokens], weight, tensors)).equal(expected[:tokens]), (frozen, pdl, tokens)
            last = bound(a_call(hidden[MAX_DOT_TOKENS - tokens :], weight, tensors))
            assert last.equal(expected[MAX_DOT_TOKENS - tokens :]), (frozen, pdl, tokens)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_hundred_runs_have_the_same_bits(frozen: bool) -> None:
    spec = SHAPES["8192x256"]
    bound, (weight, tensors) = bound_to(spec, frozen=frozen), given(spec)
    hidden = random_hidden(spec, 1)
    expected = bound(a_call(hidden, weight, tensors))
    for _ in range(100):
        assert bound(a_call(hidden, weight, tensors)).equal(expected)


def test_routes_have_the_bits_of_their_tokens() -> None:
    spec = SHAPES["odd"]
    weight, tensors = given(spec)
    hidden = random_hidden(spec, MAX_DOT_TOKENS)
    expected = routed_by(DOT_GEMM, hidden, weight, spec, tensors)
    for tokens in TOKENS:
        assert_same_bits(routed_by(DOT_GEMM, hidden[:tokens], weight, spec, tensors), rows_of(expected, tokens))


def beside_nan(tensor: Tensor, *, before: int, apart: int) -> Tensor:
    """The same numbers in rows that are further apart, from an element on; whatever is read beside them is NaN."""
    rows, size = tensor.shape
    room = torch.full((before + rows * (size + apart),), torch.nan, dtype=tensor.dtype, device=tensor.device)
    moved = room[before:].view(rows, size + apart)[:, :size]
    moved.copy_(tensor)
    return moved


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("before", "apart"), [(0, 8), (16, 24), (1, 0), (0, 3)])
@pytest.mark.parametrize("name", ["odd with bias", "8192x256"])
@pytest.mark.filterwarnings("ignore:.*is copied in every call:RuntimeWarning")
def test_rows_may_lie_anywhere(name: str, before: int, apart: int, dtype: torch.dtype) -> None:
    """Those that no lane can load are copied, with a warning."""
    spec = SHAPES[name]
    bound, (weight, tensors) = bound_to(spec, dtype, frozen=False), given(spec)
    for tokens in TOKENS:
        hidden = random_hidden(spec, tokens, dtype)
        expected = bound(a_call(hidden, weight, tensors))
        moved = [beside_nan(tensor, before=before, apart=apart) for tensor in (hidden, weight)]
        assert bound(a_call(moved[0], moved[1], tensors)).equal(expected)


@pytest.mark.parametrize("name", SHAPES)
def test_it_fills_the_logits_and_nothing_else(name: str) -> None:
    spec = SHAPES[name]
    bound, (weight, tensors) = bound_to(spec), given(spec)
    for tokens in TOKENS:
        count = tokens * spec.num_gate_rows
        room = torch.full((count + 2,), torch.nan, dtype=getattr(torch, spec.logits_dtype), device=device())
        hidden = random_hidden(spec, tokens)
        logits = room[1:-1].view(tokens, -1)
        assert bound(a_call(hidden, weight, tensors, out=filling(logits))).data_ptr() == logits.data_ptr()
        assert bound(a_call(hidden, weight, tensors)).equal(logits)
        assert room.isnan().nonzero().flatten().tolist() == [0, count + 1]


def filling(logits: Tensor) -> Routing:
    """A routing to be filled, of which a GEMM takes the logits alone."""
    return Routing(topk_ids=logits, topk_weights=logits, logits=logits)


def late_writer() -> Callable[[Tensor, Tensor], None]:
    """late(target, source): a copy that lets the kernel behind it start at once, and is made some 20 us later."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no programmatic dependent launch before compute capability 9.0")
    predecessors = Predecessors()
    predecessors.cycles = 40_000
    return lambda target, source: predecessors.launch("trigger", source, target)


def replay_often(
    bound: BoundDotGemm,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    values: list[Tensor],
    expected: list[Tensor],
) -> None:
    """A graph of late writes to `target` and calls; nothing is allocated between a write and its call."""
    write = late_writer()
    write(target, values[0])  # loaded before the capture
    made = [torch.empty_like(each) for each in expected]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for value, logits in zip(values, made, strict=True):
            write(target, value)
            bound(a_call(hidden, weight, out=filling(logits)))
    for replay in range(100):
        for logits in made:
            logits.fill_(-1)
        graph.replay()
        for at, (logits, right) in enumerate(zip(made, expected, strict=True)):
            assert logits.equal(right), f"in replay {replay}, call {at}"


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("frozen", [False, True])
def test_hidden_written_by_an_overlapping_kernel(frozen: bool, tokens: int) -> None:
    spec = SHAPES["6144x128"]
    bound, weight = bound_to(spec, frozen=frozen), random_weight(spec, torch.float32)
    values = [random_hidden(spec, tokens, seed=seed) for seed in range(20, 40)]
    expected = [bound(a_call(value, weight)) for value in values]
    hidden = torch.zeros_like(values[0])
    replay_often(bound, hidden, weight, hidden, values, expected)


@pytest.mark.parametrize("tokens", [1, 4])
def test_a_weight_written_by_an_overlapping_kernel(tokens: int) -> None:
    spec = replace(SHAPES["3072x256"], num_experts=64)
    bound, hidden = bound_to(spec, frozen=False), random_hidden(spec, tokens)
    values = [random_weight(spec, torch.float32, seed=seed) for seed in range(20, 40)]
    expected = [bound(a_call(hidden, value)) for value in values]
    weight = torch.zeros_like(values[0])
    replay_often(bound, hidden, weight, weight, values, expected)
