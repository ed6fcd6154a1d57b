"""Assignments that a gate notices: FSDP2's unsharded weights, options, and tensors stored as models store them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from noticing_gates import FROZEN, HIDDEN, SPEC, a_gate, record_prepared, routed_as, weight_of
from on_device import there
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import moegate
from moegate import Gate, RouterSpec


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


@pytest.mark.cpu
@FROZEN
def test_fsdp_that_writes_where_no_version_tells(frozen: bool, mesh: DeviceMesh) -> None:
    """FSDP2 frees a weight and assigns the same Parameter again, with the same version and often the same address."""
    spec = RouterSpec(256, 64, 4)

    def whole(rows: int) -> torch.Tensor:
        """Whole numbers, of which every order of a sum makes the same logits; ties go to the lowest id."""
        return torch.randint(-4, 5, (rows, 256)).float()

    hidden = whole(8)
    gate = Gate(spec, whole(64), frozen=frozen)
    fully_shard(gate, mesh=mesh, reshard_after_forward=True)
    for _ in range(100):
        with torch.no_grad():
            got = gate(hidden).topk_ids
            gate.reshard()  # type: ignore[operator]
            assert isinstance(gate.weight, torch.distributed.tensor.DTensor)
            assert got.equal(moegate.route(hidden, gate.weight.full_tensor(), spec).topk_ids)
            gate.weight.copy_(distribute_tensor(whole(64), mesh, [Shard(0)]))


@FROZEN
def test_a_correction_bias_that_is_a_parameter(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in vLLM: the Parameter is found, and does not count as changed in every call."""
    gate = a_gate(frozen=frozen)
    bias = nn.Parameter(there(torch.randn(SPEC.num_selectable)), requires_grad=False)
    gate.e_score_correction_bias = bias
    assert routed_as(gate)
    prepared = record_prepared(monkeypatch)
    looks = [gate._noted]
    for _ in range(3):
        gate(HIDDEN)
        looks.append(gate._noted)
    assert prepared == []
    assert all(look is looks[0] for look in looks)
    with torch.no_grad():
        bias.neg_()
    assert routed_as(gate)


def test_another_spec_in_compiled_code() -> None:
    gate = a_gate()
    gate(HIDDEN)
    other = replace(SPEC, top_k=2, routed_scaling_factor=3.0)
    gate.spec = other
    compiled = torch.compile(gate, fullgraph=True, backend="eager")(HIDDEN)
    expected = a_gate(other)(HIDDEN)
    assert compiled.topk_ids.equal(expected.topk_ids)
    assert compiled.topk_weights.equal(expected.topk_weights)


def test_a_bias_in_half_precision_wherever_it_is_read() -> None:
    """Widened in eager calls, in compiled calls and under transforms."""
    gate = a_gate()
    bias = torch.randn(SPEC.num_selectable).half()
    expected = a_gate()
    expected.e_score_correction_bias = there(bias.float())
    want = expected(HIDDEN).topk_ids

    def with_half() -> Gate:
        gate.e_score_correction_bias = there(bias)
        return gate

    assert torch.func.vmap(lambda rows: with_half()(rows)[:2])(HIDDEN[None])[0][0].equal(want)
    assert torch.compile(with_half(), fullgraph=True, backend="eager")(HIDDEN).topk_ids.equal(want)
    assert with_half()(HIDDEN).topk_ids.equal(want)


def test_options_that_are_assigned() -> None:
    gate = a_gate(frozen=True)
    gate(HIDDEN)
    gate.frozen = False
    gate.weight.data.copy_(there(weight_of(SPEC, 9)))  # a gate that is not frozen reads the weight in each call
    assert routed_as(gate)
    gate.policy = "no policy"
    with pytest.raises(ValueError, match="policy: got 'no policy'"):
        gate(HIDDEN)


def by_assignment(gate: Gate, tensor: torch.Tensor) -> None:
    gate.bias = nn.Parameter(tensor)


def by_parameter(gate: Gate, tensor: torch.Tensor) -> None:
    gate.register_parameter("bias", nn.Parameter(tensor))


def by_buffer(gate: Gate, tensor: torch.Tensor) -> None:
    del gate.bias
    gate.register_buffer("bias", tensor)


@pytest.mark.parametrize("give", [by_assignment, by_parameter, by_buffer])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_tensor_that_the_spec_does_not_take(give: Callable[[Gate, torch.Tensor], None], frozen: bool) -> None:
    gate = a_gate(frozen=frozen)
    gate(HIDDEN)
    give(gate, there(torch.zeros(SPEC.num_gate_rows)))
    with pytest.raises(ValueError, match="bias: got a tensor; allowed: None"):
        gate(HIDDEN)
