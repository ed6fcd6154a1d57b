"""Order among kernels: late writers, CUDA graphs, streams and threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_kernels import DEEPSEEK_V3, assert_same_bits, copy_of, gate_on_gpu, random_hidden, random_weight, run
from routers import SPECS
from torch import Tensor

from moegate import Gate, RouterSpec, Routing
from moegate.cuda import device as gpu
from moegate.cuda import jit

SPEC = DEEPSEEK_V3
FLOAT32 = RouterSpec(3072, 256, 8, "sigmoid", "score", renormalize=True, weight_dtype="float32")
BIAS = RouterSpec(
    2880, 32, 4, "identity", weights_from="softmax_of_selected", linear_bias=True, logits_dtype="bfloat16"
)
MANY = 1030  # by cuBLAS, which must not start while the kernel in front still writes
CYCLES = 2_000_000  # about a millisecond: a gate that does not wait finishes long before

# Triggers its dependents at once, and writes late: only a kernel that waits reads the written values.
LATE_COPY = """
struct Arguments { const int* source; int* target; long long words; };
extern "C" __global__ void late_copy(const __grid_constant__ Arguments arguments) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const long long start = clock64();
  while (clock64() - start < 40000) {}
  for (long long i = blockIdx.x * blockDim.x + threadIdx.x; i < arguments.words; i += gridDim.x * blockDim.x) {
    arguments.target[i] = arguments.source[i];
  }
}
"""
WRITER_BLOCKS = 64  # leaves multiprocessors free, on which the gate can start early


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switches conftest.py's poison off: its kernel would run between writer and gate, and act as a fence."""
    for owner, name in ((torch, "empty"), (gpu, "_empty_strided_cuda")):
        made = getattr(owner, name)
        monkeypatch.setattr(owner, name, getattr(made, "__wrapped__", made))


def late_writer() -> Callable[[Tensor, Tensor], None]:
    """late(target, source): copies by the kernel above, on the current stream."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no programmatic dependent launch before compute capability 9.0")
    module = jit.load(LATE_COPY, torch.device("cuda", torch.cuda.current_device()))
    kernel = module.kernel("late_copy", "PPq", 256, pdl=True)

    def write(target: Tensor, source: Tensor) -> None:
        words = target.numel() * target.element_size() // 4
        stream = torch.cuda.current_stream().cuda_stream
        kernel.launch((WRITER_BLOCKS, 1), stream, source.data_ptr(), target.data_ptr(), words)

    return write


@pytest.mark.parametrize("rows", [1, 16, 64, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_hidden_written_late_by_torch(frozen: bool, rows: int) -> None:
    gate = gate_on_gpu(SPEC, frozen=frozen)
    hidden = random_hidden(SPEC, rows)
    for seed in range(5, 10):
        new = random_hidden(SPEC, rows, seed=seed)
        expected = run(gate, new)
        torch.cuda._sleep(CYCLES)
        hidden.copy_(new)
        assert_same_bits(run(gate, hidden), expected)


@pytest.mark.parametrize("rows", [1, 16, 64, 100])
def test_a_weight_written_late_by_torch(rows: int) -> None:
    """Also through .data and a chain of small kernels, which neither autograd nor the gate notices."""
    gate, hidden = gate_on_gpu(SPEC), random_hidden(SPEC, rows)
    for seed in range(5, 10):
        new = random_weight(SPEC, seed=seed)
        expected = run(gate_on_gpu(SPEC, weight=new), hidden)
        torch.cuda._sleep(CYCLES)
        gate.weight.data.zero_()
        gate.weight.data.copy_(new)
        assert_same_bits(run(gate, hidden), expected)
        # a chain that ends with the original weight
        torch.cuda._sleep(CYCLES)
        gate.weight.data.neg_()
        gate.weight.data.neg_()
        assert_same_bits(run(gate, hidden), expected)


@pytest.mark.parametrize("rows", [5, MANY])
@pytest.mark.parametrize("name", ["sigmoid with bias", "softmax of selected"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_bias_written_late_by_torch(name: str, frozen: bool, rows: int) -> None:
    """With a call of refresh() for a frozen gate."""
    gate, hidden = gate_on_gpu(SPECS[name], frozen=frozen), random_hidden(SPECS[name], rows)
    bias = gate.e_score_correction_bias if gate.bias is None else gate.bias.data
    assert bias is not None
    for factor in (-1.5, 0.5, -2.0):
        new = factor * bias
        fresh = gate_on_gpu(SPECS[name])
        (fresh.e_score_correction_bias if fresh.bias is None else fresh.bias.data).copy_(new)  # type: ignore[union-attr]
        expected = run(fresh, hidden)
        torch.cuda._sleep(CYCLES)
        bias.copy_(new)
        if frozen:
            gate.refresh()
        assert_same_bits(run(gate, hidden), expected)


@pytest.mark.parametrize("overlaps", [False, True])
def test_a_frozen_weight_written_before_refresh(overlaps: bool) -> None:
    gate, hidden = gate_on_gpu(SPEC, frozen=True), random_hidden(SPEC, 3)
    write: Callable[[Tensor, Tensor], object] = late_writer() if overlaps else Tensor.copy_
    for seed in range(5, 10):
        new = random_weight(SPEC, seed=seed)
        expected = run(gate_on_gpu(SPEC, weight=new), hidden)
        torch.cuda._sleep(CYCLES)
        write(gate.weight.data, new)
        gate.refresh()
        assert_same_bits(run(gate, hidden), expected)


def replay_often(gate: Gate, hidden: Tensor, target: Tensor, values: list[Tensor], expected: list[Routing]) -> None:
    """Replays a graph of late writes and calls 200 times; checks that each output is right, and of this replay."""
    write = late_writer()
    run(gate, hidden)
    got = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for at, value in enumerate(values):
            write(target, value)
            # every other call frees its logits, which the next call overwrites
            got.append(run(gate, hidden, return_logits=at % 2 == 0))
    for replay in range(200):
        for routing in got:
            for part in routing:
                if part is not None:
                    part.fill_(-1)
        graph.replay()
        for at, (routing, right) in enumerate(zip(got, expected, strict=True)):
            kept = right if at % 2 == 0 else right.without_logits()
            assert_same_bits(routing, kept, f"in replay {replay}, call {at}")


@pytest.mark.parametrize(("spec", "rows"), [(SPEC, 1), (SPEC, 16), (SPEC, 64), (FLOAT32, MANY)], ids=str)
def test_a_weight_written_by_an_overlapping_kernel(spec: RouterSpec, rows: int) -> None:
    weight, hidden = random_weight(spec), random_hidden(spec, rows)
    values = [random_weight(spec, seed=seed) for seed in range(20, 40)]
    expected = [run(gate_on_gpu(spec, weight=value), hidden) for value in values]
    gate = gate_on_gpu(spec, weight=weight)
    assert gate.weight.data_ptr() == weight.data_ptr()
    replay_often(gate, hidden, weight, values, expected)


@pytest.mark.parametrize(("spec", "rows"), [(SPEC, 1), (SPEC, 16), (SPEC, 64), (FLOAT32, MANY), (BIAS, MANY)], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_hidden_written_by_an_overlapping_kernel(frozen: bool, spec: RouterSpec, rows: int) -> None:
    gate, hidden = gate_on_gpu(spec, frozen=frozen), random_hidden(spec, rows)
    values = [random_hidden(spec, rows, seed=seed) for seed in range(20, 40)]
    expected = [run(gate, value) for value in values]
    replay_often(gate, hidden, hidden, values, expected)


def test_a_bias_written_by_an_overlapping_kernel() -> None:
    gate, hidden = gate_on_gpu(SPEC), random_hidden(SPEC, 7)
    bias = gate.e_score_correction_bias
    assert bias is not None
    values = [bias * (0.25 * at - 2.5) for at in range(20)]
    expected = []
    for value in values:
        bias.copy_(value)
        expected.append(run(gate, hidden))
    replay_often(gate, hidden, bias, values, expected)


def captured(gate: Gate, hidden: Tensor) -> tuple[torch.cuda.CUDAGraph, Routing]:
    run(gate, hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing = run(gate, hidden)
    return graph, routing


@pytest.mark.parametrize("rows", [1, 16, 64, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_graphs_replay_what_eager_calls_do(frozen: bool, rows: int) -> None:
    gate, hidden = gate_on_gpu(SPEC, frozen=frozen), random_hidden(SPEC, rows)
    graph, routing = captured(gate, hidden)
    for seed in range(5, 15):
        hidden.copy_(random_hidden(SPEC, rows, seed=seed))
        graph.replay()
        assert_same_bits(routing, run(gate, hidden))


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_a_graph_replayed_on_two_streams_in_turn(rows: int) -> None:
    gate, hidden = gate_on_gpu(SPEC, frozen=True), random_hidden(SPEC, rows)
    graph, routing = captured(gate, hidden)
    values = [random_hidden(SPEC, rows, seed=seed) for seed in range(5, 9)]
    expected = [run(gate, value) for value in values]
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    copies = []
    for at in range(100):
        here, other = streams[at % 2], streams[1 - at % 2]
        here.wait_stream(other)
        with torch.cuda.stream(here):
            hidden.copy_(values[at % 4])
            graph.replay()
            copies.append(copy_of(routing))
    torch.cuda.synchronize()
    for at, copy in enumerate(copies):
        assert_same_bits(copy, expected[at % 4], f"in turn {at}")


def test_two_streams_at_once() -> None:
    gate = gate_on_gpu(SPEC, frozen=True)
    inputs = [random_hidden(SPEC, rows, seed=rows) for rows in (3, 40)]
    expected = [run(gate, hidden) for hidden in inputs]
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    got = []
    for at in range(400):
        with torch.cuda.stream(streams[at % 2]):
            got.append(run(gate, inputs[at % 2]))
    torch.cuda.synchronize()
    for at, routing in enumerate(got):
        assert_same_bits(routing, expected[at % 2], f"in call {at}")


@pytest.mark.parametrize("frozen", [False, True])
def test_eight_threads_with_streams_of_their_own(frozen: bool) -> None:
    gate = gate_on_gpu(SPEC, frozen=frozen)
    inputs = [random_hidden(SPEC, rows, seed=rows) for rows in (1, 5, 8, 9, 16, 33, 64, 100)]
    expected = [run(gate, hidden) for hidden in inputs]
    torch.cuda.synchronize()

    def call_often(thread: int) -> list[tuple[int, Routing]]:
        with torch.cuda.stream(torch.cuda.Stream()):
            places = [(thread + call) % 8 for call in range(200)]
            routings = [(place, run(gate, inputs[place])) for place in places]
            torch.cuda.current_stream().synchronize()
        return routings

    with ThreadPoolExecutor(8) as pool:
        for routings in pool.map(call_often, range(8)):
            for place, routing in routings:
                assert_same_bits(routing, expected[place], f"with {len(inputs[place])} tokens")
