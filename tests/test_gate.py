"""`Gate`: the module around the functions."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from on_device import back, gate_there, route, there
from routers import SPECS, generator, route_arguments, tensors_of

import moegate
from moegate import Gate
from moegate.contract.verify import verify_logits, verify_routing
from moegate.routing import Routing

SPEC = SPECS["sigmoid with bias in groups"]


def a_gate(*, frozen: bool, dtype: torch.dtype = torch.bfloat16) -> Gate:
    weight = torch.randn(SPEC.num_gate_rows, SPEC.hidden_size, generator=generator(1)).to(dtype)
    bias = tensors_of(SPEC).e_score_correction_bias
    return gate_there(SPEC, weight, e_score_correction_bias=bias, frozen=frozen)


HIDDEN = there(torch.randn(40, 64, generator=generator(2)).bfloat16())


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_gate_and_route_keep_the_contract(name: str, dtype: torch.dtype, rows: int) -> None:
    """The function and both kinds of gate: each choice against its own logits, and the logits against float64."""
    spec = SPECS[name]
    if spec.weight_dtype == "float32":
        dtype = torch.float32
    tensors = tensors_of(spec)
    weight = (torch.randn(spec.num_gate_rows, 64, generator=generator(3)) / 8).to(dtype)
    hidden = torch.randn(rows, 64, generator=generator(4)).to(dtype)
    arguments = route_arguments(spec, tensors, rows)
    routings = [route(hidden, weight, spec, **arguments, return_logits=True)]
    input_ids = arguments.pop("input_ids", None)
    for frozen in (False, True):
        gate = gate_there(spec, weight, **arguments, frozen=frozen)
        routings.append(back(gate(there(hidden), input_ids=there(input_ids), return_logits=True)))
    for routing in routings:
        assert routing.logits is not None
        assert verify_logits(routing.logits, hidden, weight, spec, tensors).problems == []
        assert verify_routing(routing, routing.logits, spec, tensors, input_ids=input_ids).problems == []


@pytest.mark.parametrize("rows", [0, 1, 40, 70])
@pytest.mark.parametrize("name", ["sigmoid with bias in groups", "sigmoid with shared gates", "hash", "identity"])
def test_given_outputs_are_filled(name: str, rows: int) -> None:
    spec, tensors = SPECS[name], tensors_of(SPECS[name])
    arguments = {key: there(value) for key, value in route_arguments(spec, tensors, rows).items()}
    ids = arguments.pop("input_ids", None)
    gate = gate_there(spec, torch.randn(spec.num_gate_rows, 64, generator=generator(3)), **arguments, frozen=True)
    hidden = there(torch.randn(rows, 64, generator=generator(4)))
    expected = gate(hidden, input_ids=ids, return_logits=True)
    for has_logits in (True, False):
        parts = (None if part is None else torch.full_like(part, 77) for part in expected)
        out = Routing(*parts)  # type: ignore[arg-type]
        out = out if has_logits else out.without_logits()
        got = gate(hidden, input_ids=ids, return_logits=True, out=out)
        for mine, given, wanted in zip(got, out, expected, strict=True):
            assert (mine is None) == (wanted is None)
            assert mine is None or mine.equal(wanted)
            assert given is None or mine is given
        assert gate(hidden, input_ids=ids, out=out).logits is None


def test_given_outputs_must_fit() -> None:
    gate = a_gate(frozen=False)
    out = gate(HIDDEN, return_logits=True)
    with pytest.raises(TypeError, match=r"out: got tuple; allowed: None, or a moegate\.Routing"):
        gate(HIDDEN, out=tuple(out))
    with pytest.raises(ValueError, match=r"out\.topk_ids: got shape \[40, 8\]; allowed: \[39, 8\]"):
        gate(HIDDEN[:39], out=out)
    with pytest.raises(TypeError, match=r"out\.topk_ids: got dtype int64; allowed: int32"):
        gate(HIDDEN, out=out._replace(topk_ids=out.topk_ids.long()))
    with pytest.raises(ValueError, match=r"out\.topk_weights: got strides"):
        gate(HIDDEN, out=out._replace(topk_weights=out.topk_weights.repeat(1, 2)[:, :8]))
    with pytest.raises(
        ValueError, match=r"out\.shared_weights: got a tensor; allowed: None, for the spec.s num_shared_gates = 0"
    ):
        gate(HIDDEN, out=out._replace(shared_weights=out.topk_weights))
    with pytest.raises(TypeError, match=r"out\.topk_weights: got NoneType"):
        gate(HIDDEN, out=out._replace(topk_weights=None))


def test_logits_come_only_when_asked_for() -> None:
    gate = a_gate(frozen=False)
    assert gate(HIDDEN).logits is None
    assert gate(HIDDEN, return_logits=True).logits is not None


def test_updates_in_place_take_effect() -> None:
    """At once for a gate that is not frozen; after refresh() for a frozen gate."""
    for frozen in (False, True):
        gate = a_gate(frozen=frozen)
        before = gate(HIDDEN).topk_ids
        gate.weight.data.neg_()
        if frozen:
            gate.refresh()
        after = gate(HIDDEN).topk_ids
        assert not after.equal(before)
        assert after.equal(
            Gate(SPEC, gate.weight, e_score_correction_bias=gate.e_score_correction_bias)(HIDDEN).topk_ids
        )


def test_the_gate_shares_its_weight() -> None:
    plain, bias = there(torch.randn(SPEC.num_gate_rows, 64)), there(torch.zeros(256))
    weight = torch.nn.Parameter(plain.clone())
    assert Gate(SPEC, weight, e_score_correction_bias=bias).weight is weight
    assert Gate(SPEC, plain, e_score_correction_bias=bias).weight.data_ptr() == plain.data_ptr()


@pytest.mark.parametrize("frozen", [False, True])
def test_load_state_dict_takes_effect(frozen: bool) -> None:
    """A frozen gate must not use the old prepared weight."""
    gate, other = a_gate(frozen=frozen), a_gate(frozen=False)
    other.weight.data.neg_()
    assert other.e_score_correction_bias is not None
    other.e_score_correction_bias.neg_()
    assert sorted(other.state_dict()) == ["e_score_correction_bias", "weight"]
    gate.load_state_dict(other.state_dict())
    assert gate(HIDDEN).topk_ids.equal(other(HIDDEN).topk_ids)


@pytest.mark.parametrize("frozen", [False, True])
def test_casts_keep_the_bias_in_float32(frozen: bool) -> None:
    """`model.to(torch.bfloat16)` would collapse biases that differ by less than a bfloat16 ulp."""
    gate = a_gate(frozen=frozen, dtype=torch.float32)
    assert gate.e_score_correction_bias is not None
    bias = gate.e_score_correction_bias.clone()
    gate.bfloat16()
    assert gate.weight.dtype == torch.bfloat16
    assert gate.e_score_correction_bias.dtype == torch.float32
    assert gate.e_score_correction_bias.equal(bias)
    expected = moegate.route(HIDDEN, gate.weight, SPEC, e_score_correction_bias=bias)
    assert gate(HIDDEN).topk_ids.equal(expected.topk_ids)


def test_what_load_state_dict_assigns_is_checked() -> None:
    """assign=True replaces the gate's tensors by others, which may have other dtypes."""
    gate = a_gate(frozen=False)
    bias = there(torch.randn(256).bfloat16())
    gate.load_state_dict({"weight": gate.weight, "e_score_correction_bias": bias}, assign=True)
    assert gate.e_score_correction_bias is not None
    assert gate.e_score_correction_bias.equal(bias.float())
    gate.double()  # no error here, since a cast of a whole model must not stop half way
    with pytest.raises(TypeError, match="weight: got dtype float64"):
        gate(HIDDEN)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("frozen", [False, True])
def test_compiled(frozen: bool, backend: str) -> None:
    """A compiled gate routes like an eager one, at few and at many tokens."""
    for name in ("sigmoid with bias in groups", "softmax renormalised"):
        spec = SPECS[name]
        arguments = route_arguments(spec, tensors_of(spec), 0)
        weight = (torch.randn(spec.num_gate_rows, 64, generator=generator(3)) / 8).bfloat16()
        gate = gate_there(spec, weight, **arguments, frozen=frozen)
        compiled = torch.compile(gate, backend=backend)
        for rows in (3, 40):
            routing = compiled(HIDDEN[:rows], return_logits=True)
            assert verify_logits(routing.logits, HIDDEN[:rows], weight, spec, tensors_of(spec)).problems == []
            assert verify_routing(routing, routing.logits, spec, tensors_of(spec)).problems == []


# PyTorch's warning in each new thread whose first CUDA call is a GEMM.
@pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS, but there was no current CUDA context:UserWarning")
@pytest.mark.parametrize("precision", ["highest", pytest.param("medium", marks=pytest.mark.cpu)])
@pytest.mark.parametrize("frozen", [False, True])
def test_threads(frozen: bool, precision: str) -> None:
    """Many threads get the same results as one, also while the process allows reduced precision on the CPU."""
    gate = a_gate(frozen=frozen)
    expected = [gate(HIDDEN[:rows]) for rows in range(41)]
    torch.set_float32_matmul_precision(precision)
    try:
        with ThreadPoolExecutor(8) as pool:
            got = list(pool.map(lambda rows: gate(HIDDEN[:rows]), list(range(41)) * 5))
    finally:
        torch.set_float32_matmul_precision("highest")
    for routing, single in zip(got, expected * 5, strict=True):
        assert routing.topk_ids.equal(single.topk_ids)
        assert routing.topk_weights.equal(single.topk_weights)


def test_casts_keep_a_pinned_weight_in_float32() -> None:
    spec = SPECS["softmax with bias and floor"]
    gate = gate_there(spec, torch.randn(64, 64), e_score_correction_bias=torch.zeros(64))
    weight = gate.weight.detach().clone()
    gate.half()
    assert gate.weight.dtype == torch.float32
    assert gate.weight.equal(weight)


def test_a_bias_in_half_precision_is_widened() -> None:
    bias = torch.randn(256).bfloat16()
    gate = gate_there(SPEC, torch.randn(256, 64), e_score_correction_bias=bias)
    assert gate.e_score_correction_bias is not None
    assert gate.e_score_correction_bias.cpu().equal(bias.float())


@pytest.mark.parametrize("frozen", [False, True])
def test_copies(frozen: bool) -> None:
    gate = a_gate(frozen=frozen)
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert twin(HIDDEN).topk_weights.equal(gate(HIDDEN).topk_weights)
        twin.weight.data.neg_()
        twin.refresh()
        assert not twin(HIDDEN).topk_ids.equal(gate(HIDDEN).topk_ids)


def test_import_is_light() -> None:
    """`import moegate` imports nothing slow, and makes no CUDA context."""
    code = (
        "import sys, torch; before = set(sys.modules); import moegate; moegate.Gate, moegate.route; "
        "heavy = {'transformers', 'safetensors', 'rich', 'typer', 'numpy', 'tomllib'} & (set(sys.modules) - before); "
        "assert not heavy, heavy; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def test_warmup_routes_a_token_of_each_dtype() -> None:
    gate = a_gate(frozen=False)
    seen: list[torch.dtype] = []
    gate.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    gate.warmup(torch.float16, torch.float32)
    assert seen == [torch.float16, torch.float32]
    with pytest.raises(TypeError, match="hidden: got dtype float64"):
        gate.warmup(torch.float64)
