"""The cuda backend on a GPU: it runs every spec, keeps the contract on every path, and reports what it cannot do."""

from __future__ import annotations

import warnings

import pytest
import torch
from cuda_kernels import (
    DEEPSEEK_V3,
    a_call,
    a_problem,
    assert_same_bits,
    gate_on_gpu,
    on_gpu,
    problems_of,
    random_hidden,
    random_weight,
    run,
)
from routers import SPECS, random_logits, tensors_of, token_ids
from torch import Tensor

import moegate
from moegate import Gate, RouterSpec, Routing
from moegate.contract.verify import verify_logits, verify_routing
from moegate.gemm.router_gemm import BoundRouterGemm
from moegate.problem import dtypes_of
from moegate.selection.select_kernel import BoundSelect

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SPEC = SPECS["sigmoid with bias in groups"]
PTX_SHAPES = {
    **{name: SPECS[name] for name in ("sigmoid", "softmax of selected", "input norm and expert scale")},
    "deepseek-v3": DEEPSEEK_V3,
    "odd": RouterSpec(1000, 258, 6, "sigmoid", "score", renormalize=True),
}


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_every_spec_runs_on_the_kernels(name: str, frozen: bool) -> None:
    gate = gate_on_gpu(SPECS[name], frozen=frozen)
    assert gate._notice()[0].dispatch.name == "cuda"
    for rows in (0, 1, 3, 64, 65):
        hidden = random_hidden(SPECS[name], rows)
        assert problems_of(run(gate, hidden), hidden, gate.weight, SPECS[name], tensors_of(SPECS[name])) == []


@pytest.mark.parametrize("hidden_size", [1, 63, 100, 7166])
def test_a_k_that_no_lane_can_load_warns_once_and_works(hidden_size: int) -> None:
    spec = RouterSpec(hidden_size, 48, 4, "sigmoid", renormalize=True)
    with pytest.warns(RuntimeWarning, match=f"K = {hidden_size} is not a multiple of 8"):
        gate = gate_on_gpu(spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gate_on_gpu(spec)
        for rows in (0, 1, 17, 65):
            hidden = random_hidden(spec, rows)
            assert problems_of(run(gate, hidden), hidden, gate.weight, spec, tensors_of(spec)) == []
    assert gate._notice()[0].dispatch.name == "cuda"


@pytest.mark.parametrize("arch", ["compute_80", "compute_90"])
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PTX_SHAPES)
def test_gemms_from_ptx_keep_the_contract(
    name: str, hidden_dtype: torch.dtype, weight_dtype: torch.dtype, arch: str
) -> None:
    """The PTX for chips newer than this package; and the path without clusters, on a chip with clusters."""
    spec = PTX_SHAPES[name]
    tensors = on_gpu(tensors_of(spec))
    dtypes = dtypes_of(spec, weight_dtype, tensors)._replace(hidden=hidden_dtype)
    # compute_80 has no griddepcontrol.wait
    problem = a_problem(spec, dtypes)._replace(pdl=arch == "compute_90")
    bound = BoundRouterGemm(problem, device(), arch)
    weight = random_weight(spec, weight_dtype)
    for rows in (1, 8, 17, 33, 64):
        hidden = random_hidden(spec, rows, hidden_dtype)
        logits = bound(a_call(hidden, weight, tensors))
        assert verify_logits(logits, hidden, weight, spec, tensors).problems == []


@pytest.mark.parametrize("arch", ["compute_80", "compute_90"])
@pytest.mark.parametrize("name", SPECS)
def test_selections_from_ptx_keep_the_contract(name: str, arch: str) -> None:
    spec = SPECS[name]
    tensors = on_gpu(tensors_of(spec))
    problem = a_problem(spec, dtypes_of(spec, torch.bfloat16, tensors))._replace(pdl=arch == "compute_90")
    bound = BoundSelect(problem, device(), None, arch)
    for rows in (1, 9, 2000):
        logits = random_logits(spec, rows).cuda()
        ids = token_ids(rows).cuda() if spec.hash_routing else None
        routing = bound(a_call(logits, logits, tensors, input_ids=ids), logits)
        verdict = verify_routing(routing, logits, spec, tensors, input_ids=ids)
        assert verdict.problems == []


def shifted(hidden: Tensor) -> Tensor:
    """The same values, shifted by one element from alignment."""
    buffer = torch.zeros(hidden.numel() + 1, dtype=hidden.dtype, device=hidden.device)
    buffer[1:] = hidden.flatten()
    return buffer[1:].view_as(hidden)


def apart(hidden: Tensor, by: int) -> Tensor:
    """The same values, in rows that are `by` elements further apart."""
    rows, size = hidden.shape
    buffer = torch.zeros(rows, size + by, dtype=hidden.dtype, device=hidden.device)
    buffer[:, :size] = hidden
    return buffer[:, :size]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("how", ["offset by one", "rows K + 1 apart"])
def test_misaligned_hidden_gives_the_same_bits_and_warns_once(how: str, dtype: torch.dtype) -> None:
    gate, hidden = gate_on_gpu(SPEC, dtype), random_hidden(SPEC, 33, dtype)
    expected = run(gate, hidden)
    moved = shifted(hidden) if how == "offset by one" else apart(hidden, 1)
    with pytest.warns(RuntimeWarning, match="hidden is copied in every call"):
        assert_same_bits(run(gate, moved), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(run(gate, moved), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_rows_apart_are_read_in_place(dtype: torch.dtype) -> None:
    gate, hidden = gate_on_gpu(SPEC, dtype), random_hidden(SPEC, 33, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same_bits(run(gate, apart(hidden, 8)), run(gate, hidden))


@pytest.mark.parametrize("rows", [1, 9, 100, 1100])
def test_given_logits_may_start_anywhere(rows: int) -> None:
    gate, hidden = gate_on_gpu(SPEC), random_hidden(SPEC, rows)
    expected = run(gate, hidden)
    assert expected.logits is not None
    buffer = torch.full((expected.logits.numel() + 1,), torch.nan, device="cuda")
    out = expected._replace(logits=buffer[1:].view_as(expected.logits))
    assert_same_bits(gate(hidden, return_logits=True, out=out), run(gate, hidden))


@pytest.mark.parametrize("rows", [1, 9])
def test_a_failed_launch_leaves_the_next_call_right(rows: int) -> None:
    gate, hidden = gate_on_gpu(SPEC), random_hidden(SPEC, rows)
    expected = run(gate, hidden)
    gemm, select = gate._notice()[0].dispatch._at("both", rows, hidden.dtype)
    assert isinstance(gemm, BoundRouterGemm)
    assert isinstance(select, BoundSelect)
    few = [kernels[0][-1] for kernels in select._of_logits if kernels is not None]
    for kernel in {*few, *gemm._kernels.values()}:
        nothing = kernel._pack.unpack(bytes(kernel._pack.size))
        with pytest.raises(RuntimeError, match="cuLaunchKernelEx: CUDA_ERROR_INVALID"):
            kernel.launch((0, 1), torch.cuda.current_stream().cuda_stream, *nothing)
    assert_same_bits(run(gate, hidden), expected)


def test_a_compilation_inside_a_capture_is_refused() -> None:
    spec = RouterSpec(72, 37, 3, "sigmoid", renormalize=True, routed_scaling_factor=1.0625)
    weight, hidden = random_weight(spec), random_hidden(spec, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        torch.zeros(1, device="cuda")  # PyTorch warns of an empty graph
        with pytest.raises(RuntimeError, match=r"captured into a CUDA graph; allowed: .*Gate\.warmup\(\)"):
            moegate.route(hidden, weight, spec)
    # the refusal is not cached
    expected = moegate.route(hidden, weight, spec, return_logits=True)
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        captured = moegate.route(hidden, weight, spec, return_logits=True)
    graph.replay()
    assert_same_bits(captured, expected)


def routing_on(index: int) -> tuple[Routing, Gate]:
    with torch.cuda.device(index):
        given, weight = on_gpu(tensors_of(DEEPSEEK_V3))._asdict(), random_weight(DEEPSEEK_V3)
        hidden = random_hidden(DEEPSEEK_V3, 33)  # for a kernel with more shared memory than the default limit
    gate = Gate(DEEPSEEK_V3, weight, **given)  # with the first device current again
    return run(gate, hidden), gate


def test_on_another_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device; this is about a second one")
    expected, _ = routing_on(0)
    routing, gate = routing_on(1)
    assert gate._notice()[0].dispatch.name == "cuda"
    for part, other in zip(routing[:3], expected[:3], strict=True):
        assert isinstance(part, Tensor)
        assert isinstance(other, Tensor)
        assert part.device.index == 1
        assert part.cpu().equal(other.cpu())
    assert torch.cuda.current_device() == 0
