"""Changes that a gate notices while a model is loaded, cast, copied, captured or trained."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from noticing_gates import (
    FROZEN,
    HASH,
    HIDDEN,
    IDS,
    PINNED,
    SPEC,
    a_gate,
    routed_as,
    set_data,
    weight_of,
    write,
)
from on_device import back, gate_there, there
from routers import SPECS, tensors_of
from torch import Tensor, nn

import moegate
from moegate import Gate


# Gates made on meta, and loaded later.
@FROZEN
@pytest.mark.parametrize("name", ["sigmoid with bias in groups", "hash", "input norm and expert scale"])
def test_meta_then_to_empty_then_loaded(name: str, frozen: bool) -> None:
    spec = SPECS[name]
    whole = a_gate(spec)
    ids = {"input_ids": IDS} if spec.hash_routing else {}
    on_meta = {key: part.to("meta") for key, part in tensors_of(spec)._asdict().items() if part is not None}
    gate = Gate(spec, weight_of(spec).to("meta"), **on_meta, frozen=frozen)
    assert gate(HIDDEN.to("meta"), **{key: part.to("meta") for key, part in ids.items()}).topk_ids.is_meta
    gate.to_empty(device=HIDDEN.device)
    gate.load_state_dict(whole.state_dict())
    assert routed_as(gate, **ids)


@FROZEN
def test_meta_then_assigned_one_by_one(frozen: bool) -> None:
    """As Transformers and accelerate load models: without calling a method of the module."""
    whole = a_gate(PINNED)
    gate = Gate(
        PINNED, weight_of(PINNED).to("meta"), e_score_correction_bias=torch.empty(64, device="meta"), frozen=frozen
    )
    gate._parameters["weight"] = nn.Parameter(whole.weight.detach())
    gate._buffers["e_score_correction_bias"] = whole.e_score_correction_bias
    assert routed_as(gate)
    assert bool(gate._notice()[0].prepared) == frozen or HIDDEN.is_cuda


def test_a_backend_is_not_asked_for_on_meta() -> None:
    """A forced backend applies once the tensors are on their device."""
    gate = Gate(
        SPEC, weight_of(SPEC).to("meta"), e_score_correction_bias=torch.empty(256, device="meta"), backend="cuda"
    )
    assert "backend='torch'" in repr(gate)
    with pytest.raises(ValueError, match="backend: got 'cuda_'"):
        Gate(SPEC, weight_of(SPEC).to("meta"), e_score_correction_bias=torch.empty(256, device="meta"), backend="cuda_")


def test_a_parameter_that_goes_to_meta_when_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under accelerate's init_empty_weights, which does not move buffers."""
    register = Gate.register_parameter

    def on_meta(self: Gate, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    monkeypatch.setattr(Gate, "register_parameter", on_meta)
    gate = a_gate(frozen=True)
    monkeypatch.undo()
    assert gate.weight.is_meta
    gate.weight = nn.Parameter(there(weight_of(SPEC)))
    assert routed_as(gate)


def test_hooks_that_move_a_weight_for_each_call() -> None:
    """As accelerate offloads weights: on meta between calls, also for a frozen gate."""
    for frozen in (False, True):
        gate, weight = a_gate(frozen=frozen), there(weight_of(SPEC, 9))
        expected = Gate(SPEC, weight, e_score_correction_bias=gate.e_score_correction_bias)(HIDDEN).topk_ids

        def onload(module: nn.Module, _: object, weight: Tensor = weight) -> None:
            module._parameters["weight"] = nn.Parameter(weight.clone())

        def offload(module: nn.Module, *_: object) -> None:
            module._parameters["weight"] = nn.Parameter(weight_of(SPEC).to("meta"))

        gate.register_forward_pre_hook(onload)
        gate.register_forward_hook(offload)
        for _ in range(3):
            assert gate(HIDDEN).topk_ids.equal(expected)


# The check of hash tables.
def test_a_placeholder_table_is_checked_at_the_first_call() -> None:
    table = tensors_of(HASH).tid2eid
    assert table is not None
    for placeholder in (torch.zeros_like(table), torch.full_like(table, -1), torch.full_like(table, 2**30)):
        for frozen in (False, True):
            gate = gate_there(HASH, weight_of(HASH), tid2eid=placeholder.clone(), frozen=frozen)
            for _ in range(2):
                with pytest.raises(ValueError, match=r"tid2eid: got"):
                    gate(HIDDEN, input_ids=IDS)
            with pytest.raises(ValueError, match=r"tid2eid: got"):
                gate.refresh()
            copy.deepcopy(gate)
            gate.load_state_dict({"tid2eid": there(table)}, strict=False)
            assert routed_as(gate, input_ids=IDS)


@FROZEN
def test_a_table_that_was_written_is_checked_again(frozen: bool) -> None:
    gate = a_gate(HASH, frozen=frozen)
    assert gate.tid2eid is not None
    gate.tid2eid[3, 0] = 96
    with pytest.raises(ValueError, match="tid2eid: got expert 96; allowed: 0 to 95"):
        gate(HIDDEN, input_ids=IDS)
    gate.tid2eid[3] = torch.arange(6)
    assert routed_as(gate, input_ids=IDS)
    gate.tid2eid = gate.tid2eid[:40]  # another vocabulary
    with pytest.raises(ValueError, match="tid2eid: got"):
        torch.func.functional_call(gate, {"tid2eid": gate.tid2eid * 0}, (HIDDEN,), {"input_ids": IDS})


# Weights that the spec pins to float32.
@pytest.mark.parametrize("gate_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_cast_of_a_model_that_shares_the_weight(gate_first: bool, dtype: torch.dtype) -> None:
    """The whole model is cast, in any order, and the gate's next call raises an error with a remedy."""
    gate, linear = a_gate(PINNED, frozen=True), nn.Linear(64, 64, bias=False, device=HIDDEN.device)
    linear.weight = gate.weight
    model = nn.ModuleList([gate, linear] if gate_first else [linear, gate])
    model.append(nn.Linear(2, 2))
    float32 = gate.weight.detach().clone()
    model.to(dtype)
    assert model[2].weight.dtype == dtype
    assert linear.weight.dtype == dtype
    message = r"pins it.*another module.*one of its own" if dtype == torch.bfloat16 else "allowed: float32"
    with pytest.raises(TypeError, match=message):
        gate(HIDDEN)
    gate.weight = nn.Parameter(float32)  # the remedy in the error
    assert routed_as(gate)
    model.to(torch.bfloat16)
    assert gate.weight.equal(float32)


def test_a_cast_of_a_model_with_a_gate_that_takes_no_float64() -> None:
    model = nn.Sequential(nn.Linear(2, 2), a_gate(), nn.Linear(2, 2))
    model.double()
    assert model[2].weight.dtype == torch.float64
    with pytest.raises(TypeError, match="weight: got dtype float64"):
        model[1](HIDDEN)
    gate = model.float()[1]
    assert isinstance(gate, Gate)
    assert routed_as(gate)


def test_casts_under_the_settings_of_pytorch() -> None:
    for setting in ("overwrite_module_params_on_conversion", "swap_module_params_on_conversion"):
        set_it = getattr(torch.__future__, f"set_{setting}")
        gate = a_gate(PINNED, frozen=True)
        float32 = gate.weight.detach().clone()
        set_it(True)
        try:
            gate.bfloat16()
        finally:
            set_it(False)
        assert gate.weight.equal(float32)
        assert routed_as(gate)


@pytest.mark.cpu
def test_a_refresh_during_a_capture_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that pretends to capture; test_cuda_streams.py has the test on a GPU."""
    gate, capturing = a_gate(frozen=True), [True]
    bias = gate.e_score_correction_bias
    for module in ("takes_note", "noticing"):
        monkeypatch.setattr(f"moegate.{module}.is_capturing", lambda device: capturing[0])
    gate(HIDDEN)
    changes: list[tuple[str, Callable[[], object]]] = [
        ("weight", lambda: write(gate, gate.weight)),
        ("e_score_correction_bias", lambda: bias is not None and bias.add_(0)),
        ("gate", lambda: setattr(gate, "spec", replace(SPEC))),
    ]
    for name, change in changes:
        change()
        with pytest.raises(RuntimeError, match=rf"{name}: .*call gate\.refresh\(\) before the capture"):
            gate(HIDDEN)
        capturing[0] = False
        gate.refresh()
        capturing[0] = True
        gate(HIDDEN)


# Gradients.
@FROZEN
def test_no_gradient_is_told_once(frozen: bool) -> None:
    def told(gate: Callable[[Tensor], object], hidden: Tensor) -> int:
        moegate.warn.warn_once.cache_clear()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                gate(hidden)
        return sum("no gradient flows through a routing" in str(each.message) for each in caught)

    gate, learns = a_gate(frozen=frozen), HIDDEN.detach().clone().requires_grad_()
    assert told(gate, HIDDEN) == 0
    assert told(gate, learns) == 1
    with torch.no_grad():
        assert told(gate, learns) == 0
    gate.weight.requires_grad_()
    assert told(gate, HIDDEN) == 1
    scaled = a_gate(SPECS["input norm and expert scale"], frozen=frozen)
    assert scaled.per_expert_scale is not None
    assert told(scaled, HIDDEN) == 0
    scaled.per_expert_scale.requires_grad_()
    assert told(scaled, HIDDEN) == 1
    torch.compiler.reset()
    assert told(torch.compile(gate, fullgraph=True, backend="aot_eager"), HIDDEN) == 1


@FROZEN
def test_copies_of_a_gate_that_changed(frozen: bool) -> None:
    gate = a_gate(frozen=frozen)
    set_data(gate, there(weight_of(SPEC, 11)))
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate)), copy.copy(gate)):
        assert back(twin(HIDDEN)).topk_ids.equal(back(gate(HIDDEN)).topk_ids)
        write(twin, -twin.weight)
        assert routed_as(twin)
