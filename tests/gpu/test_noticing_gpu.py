"""Noticing on a GPU: kernels read whatever is at their addresses, so each call looks before it launches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cuda_kernels import DEEPSEEK_V3, assert_same_bits, gate_on_gpu, random_hidden, random_weight, run
from routers import SPECS
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from moegate import Gate, RouterSpec

SPEC = DEEPSEEK_V3
FROZEN = pytest.mark.parametrize("frozen", [False, True])


def _write(gate: Gate, weight: Tensor) -> None:
    with torch.no_grad():
        gate.weight.copy_(weight)


def _set_data(gate: Gate, weight: Tensor) -> None:
    gate.weight.data = weight


def _set_data_between_two_multiples_of_16_bytes(gate: Gate, weight: Tensor) -> None:
    moved = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=weight.device)[1:].view_as(weight)
    gate.weight.data = moved.copy_(weight)


def _other_dtype(gate: Gate, weight: Tensor) -> None:
    gate.weight = nn.Parameter(weight.half(), requires_grad=False)


def _offload(gate: Gate, weight: Tensor) -> None:
    gate.weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    gate.weight = nn.Parameter(weight, requires_grad=False)


CHANGES = [_write, _set_data, _set_data_between_two_multiples_of_16_bytes, _other_dtype, _offload]


@pytest.mark.parametrize("rows", [3, 60])
@pytest.mark.parametrize("change", CHANGES)
@FROZEN
def test_another_weight_takes_effect(frozen: bool, change: Callable[[Gate, Tensor], None], rows: int) -> None:
    gate, hidden = gate_on_gpu(SPEC, frozen=frozen), random_hidden(SPEC, rows)
    run(gate, hidden)
    change(gate, random_weight(SPEC, seed=11))
    got = run(gate, hidden)
    now = Gate(SPEC, gate.weight.clone(), e_score_correction_bias=gate.e_score_correction_bias, frozen=frozen)
    assert_same_bits(got, run(now, hidden))
    assert gate._notice()[0].dispatch.name == "cuda"


@FROZEN
def test_what_does_not_fit_is_an_error(frozen: bool) -> None:
    """Otherwise kernels would read past the end, or a bfloat16 bias as float32, or address 0."""
    hidden = random_hidden(SPEC, 3)
    gate = gate_on_gpu(SPEC, frozen=frozen)
    gate.weight.data = gate.weight.data[:200]
    with pytest.raises(ValueError, match=r"weight: got shape \[200, 7168\]"):
        gate(hidden)
    gate = gate_on_gpu(SPEC, frozen=frozen)
    bias = gate.e_score_correction_bias
    assert bias is not None
    for value, message in ((None, "got None"), (bias[:1], r"got shape \[1\]"), (bias.cpu(), "got device cpu")):
        gate.e_score_correction_bias = value
        with pytest.raises(ValueError, match=f"e_score_correction_bias: {message}"):
            gate(hidden)
    gate.e_score_correction_bias = bias.bfloat16()
    got = run(gate, hidden)
    assert_same_bits(got, run(Gate(SPEC, gate.weight, e_score_correction_bias=bias.bfloat16().float()), hidden))


@FROZEN
def test_from_meta_by_assignment(frozen: bool) -> None:
    """The CUDA kernels run, not PyTorch's operations."""
    whole, hidden = gate_on_gpu(SPEC, frozen=frozen), random_hidden(SPEC, 3)
    assert whole.e_score_correction_bias is not None
    bias = whole.e_score_correction_bias.to("meta")
    gate = Gate(SPEC, whole.weight.to("meta"), e_score_correction_bias=bias, frozen=frozen, backend="cuda")
    for name, tensor in whole.state_dict().items():
        holder = gate._parameters if name == "weight" else gate._buffers
        holder[name] = nn.Parameter(tensor, requires_grad=False) if name == "weight" else tensor
    assert_same_bits(run(gate, hidden), run(whole, hidden))
    assert gate._notice()[0].dispatch.name == "cuda"


def test_a_capture_after_a_change() -> None:
    """A frozen gate refuses until refresh(); a gate that is not frozen accepts a weight of the same form."""
    hidden, weight = random_hidden(SPEC, 3), random_weight(SPEC, seed=12)
    for frozen in (True, False):
        gate = gate_on_gpu(SPEC, frozen=frozen)
        run(gate, hidden)
        _write(gate, weight)
        expected = run(gate_on_gpu(SPEC, weight=weight, frozen=frozen), hidden)
        graph = torch.cuda.CUDAGraph()
        if frozen:
            with pytest.raises(RuntimeError, match=r"weight: .*call gate\.refresh\(\) before"), torch.cuda.graph(graph):
                gate(hidden)
            gate.refresh()
            graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gate(hidden, return_logits=True)
        graph.replay()
        assert_same_bits(captured, expected)


def test_a_refresh_in_a_capture_is_an_error() -> None:
    gate = gate_on_gpu(SPEC, frozen=True)
    with (
        pytest.raises(RuntimeError, match=r"call gate\.refresh\(\) before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        gate.refresh()


def test_a_hash_gate_is_captured_at_once() -> None:
    """The table was checked by the constructor; another check would synchronize, which a capture forbids."""
    spec: RouterSpec = SPECS["hash"]
    gate, hidden = gate_on_gpu(spec, frozen=False), random_hidden(spec, 3)
    ids = torch.arange(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gate(hidden, input_ids=ids)
    graph.replay()
    assert captured.topk_ids.equal(gate(hidden, input_ids=ids).topk_ids)
    assert gate.tid2eid is not None
    gate.tid2eid[0, 0] = 2**30
    with pytest.raises(ValueError, match="tid2eid: got expert"):
        gate(hidden, input_ids=ids)


def test_transforms_and_fakes() -> None:
    """No kernel gets a wrapper."""
    gate, hidden = gate_on_gpu(SPEC, frozen=True), random_hidden(SPEC, 6)
    ids = torch.func.vmap(lambda one: gate(one).topk_ids)(hidden.view(2, 3, -1))
    # PyTorch's GEMM may differ in the last bits; random logits of 256 experts are far enough apart.
    assert (ids.flatten(0, 1) == gate(hidden).topk_ids).float().mean() > 0.9
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = gate(mode.from_tensor(hidden))
        assert (fake.topk_ids.shape, fake.topk_ids.device.type) == ((6, 8), "cuda")
