"""A gate notices changed tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from noticing_gates import (
    FROZEN,
    HIDDEN,
    SPEC,
    a_gate,
    assign,
    routed_as,
    set_data,
    weight_of,
    write,
)
from on_device import there
from routers import generator
from torch import Tensor, nn

import moegate
from moegate import Gate

# Ways to put another weight [256, 64] into a gate without a call of `refresh()`.


def _put_at_the_same_address(gate: Gate, weight: Tensor) -> None:
    """As an allocator may do with memory that was freed."""
    place = gate.weight.data
    del gate.weight
    place.copy_(weight)
    gate.weight = nn.Parameter(place)


def _set_storage(gate: Gate, weight: Tensor) -> None:
    with torch.no_grad():
        gate.weight.set_(weight)  # type: ignore[call-overload] # the stub lacks a tensor


def _swap(gate: Gate, weight: Tensor) -> None:
    torch.utils.swap_tensors(gate.weight, nn.Parameter(weight))


def _load(gate: Gate, weight: Tensor) -> None:
    gate.load_state_dict({"weight": weight}, strict=False, assign=True)


def _step(gate: Gate, weight: Tensor) -> None:
    gate.weight.requires_grad_()
    gate.weight.grad = gate.weight.detach() - weight
    torch.optim.SGD([gate.weight], lr=1.0).step()
    gate.weight.requires_grad_(False)


def _into_dict(gate: Gate, weight: Tensor) -> None:
    gate._parameters["weight"] = weight  # type: ignore[assignment] # as FSDP does


CHANGES: list[Callable[[Gate, Tensor], None]] = [
    write,
    assign,
    _put_at_the_same_address,
    set_data,
    _set_storage,
    _swap,
    _load,
    _step,
    _into_dict,
]


@pytest.mark.parametrize("change", CHANGES)
@FROZEN
def test_another_weight_takes_effect(frozen: bool, change: Callable[[Gate, Tensor], None]) -> None:
    gate = a_gate(frozen=frozen)
    before = gate(HIDDEN).topk_ids
    change(gate, there(weight_of(SPEC, 7)))
    assert routed_as(gate)
    assert not gate(HIDDEN).topk_ids.equal(before)


@pytest.mark.parametrize("change", CHANGES)
def test_another_weight_that_is_alike_costs_no_refresh(
    change: Callable[[Gate, Tensor], None], prepared: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 and functional_call swap tensors in every step."""
    gate = a_gate()
    gate(HIDDEN)
    monkeypatch.setattr(Gate, "_take_note", lambda *_, **__: pytest.fail("a refresh"))
    if change is not _load:  # a hook after load_state_dict refreshes
        change(gate, there(weight_of(SPEC, 7)))
        gate(HIDDEN)
        weight, bias = (there(tensor) for tensor in (weight_of(SPEC, 8), torch.randn(256)))
        swapped = {"weight": weight, "e_score_correction_bias": bias}
        got = torch.func.functional_call(gate, swapped, (HIDDEN,))
        assert got.topk_ids.equal(moegate.route(HIDDEN, weight, SPEC, e_score_correction_bias=bias).topk_ids)


def test_a_frozen_gate_prepares_again_only_for_a_change(prepared: list[Tensor]) -> None:
    gate = a_gate(frozen=True)
    for _ in range(3):
        gate(HIDDEN)
    assert len(prepared) == 1
    write(gate, gate.weight * 2)
    for _ in range(3):
        gate(HIDDEN)
    assert len(prepared) == 2


def test_what_counts_no_version_needs_refresh() -> None:
    """Writes that no call can notice, as docs/noticing.md says."""
    for inference in (False, True):
        with torch.inference_mode(inference):
            gate = a_gate(frozen=True)
            before = gate(HIDDEN).topk_ids
            (gate.weight if inference else gate.weight.data).neg_()
            gate.refresh()
            assert routed_as(gate)
            assert not gate(HIDDEN).topk_ids.equal(before)


def test_many_refreshes_of_a_frozen_gate_are_told() -> None:
    gate = a_gate(frozen=True)
    for call in range(1, 20):
        write(gate, gate.weight)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gate(HIDDEN)
        told = ["16 calls found the tensors of a frozen gate changed" in str(each.message) for each in caught]
        assert told == ([True] if call == 16 else [])


@FROZEN
def test_a_bias_in_half_precision_that_was_assigned_is_widened(frozen: bool) -> None:
    for make in (lambda bias: bias, nn.Parameter):
        gate = a_gate(frozen=frozen)
        bias = there(torch.randn(256, generator=generator(3)).bfloat16())
        gate.e_score_correction_bias = make(bias)
        got = gate(HIDDEN)
        assert gate.e_score_correction_bias.dtype == torch.float32
        assert got.topk_ids.equal(
            moegate.route(HIDDEN, gate.weight, SPEC, e_score_correction_bias=bias.float()).topk_ids
        )


@FROZEN
def test_a_pruned_gate_with_the_spec_of_its_rest(frozen: bool) -> None:
    """As by a pruner, which replaces spec, weight and bias one by one."""
    gate = a_gate(frozen=frozen)
    gate.weight.data = gate.weight.data[:128]
    gate.e_score_correction_bias = gate.e_score_correction_bias[:128]  # type: ignore[index]
    gate.spec = replace(SPEC, num_experts=128)
    assert routed_as(gate)
    assert int(gate(HIDDEN).topk_ids.max()) < 128
    gate.spec = replace(SPEC, num_experts=128, routed_scaling_factor=1.0)
    assert routed_as(gate)


@FROZEN
def test_torch_prunes_and_parametrizes(frozen: bool) -> None:
    """torch.nn.utils replaces the Parameter by a computed tensor."""
    from torch.nn.utils import parametrize, prune

    class Negated(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return -weight

    gate = a_gate(frozen=frozen)
    parametrize.register_parametrization(gate, "weight", Negated())
    assert routed_as(gate)
    gate = a_gate(frozen=frozen)
    before = gate(HIDDEN).topk_ids
    prune.random_unstructured(gate, "weight", amount=0.5)
    assert routed_as(gate)
    assert not gate(HIDDEN).topk_ids.equal(before)
    prune.remove(gate, "weight")
    assert routed_as(gate)


@FROZEN
def test_explain_tells_of_the_tensors_that_are_there(frozen: bool) -> None:
    gate = a_gate(frozen=frozen)
    gate.weight.data = gate.weight.data.float()
    gate.explain(1)
    assert gate._notice()[0].dispatch.plan.problem.dtypes.weight == torch.float32
    gate.e_score_correction_bias = None
    with pytest.raises(ValueError, match="e_score_correction_bias: got None"):
        gate.explain(1)
    assert "num_experts=256" in repr(gate)  # still works, without a plan
