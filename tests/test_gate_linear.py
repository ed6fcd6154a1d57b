"""`GateLinear`: the prepared GEMM of a router."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from noticing_gates import record_prepared
from on_device import all_there, there
from routers import generator
from torch import Tensor, nn

import moegate.warn
from moegate import GateLinear, RouterSpec
from moegate.contract.verify import verify_logits
from moegate.routing import RouterTensors

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed)).to(dtype)


def a_gate(weight: Tensor, bias: Tensor | None = None, **options: Any) -> GateLinear:
    return GateLinear(there(weight), None if bias is None else there(bias), **all_there(options))


def assert_multiplies(gate: GateLinear, weight: Tensor, bias: Tensor | None = None, rows: int = 5) -> None:
    """The logits of the gate lie within the contract's bound around those in float64."""
    hidden = random(rows, weight.shape[1], dtype=weight.dtype, seed=rows)
    logits = gate(there(hidden)).cpu()
    dtype = "float32" if gate.out_dtype == torch.float32 else "bfloat16"
    spec = RouterSpec(weight.shape[1], len(weight), 1, linear_bias=bias is not None, logits_dtype=dtype)  # type: ignore[arg-type]
    assert verify_logits(logits, hidden, weight, spec, RouterTensors(bias)).problems == []


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_logits(has_bias: bool, dtype: torch.dtype, out_dtype: torch.dtype, frozen: bool) -> None:
    weight, bias = random(33, 64, dtype=dtype, seed=1), random(33, dtype=dtype, seed=2) if has_bias else None
    gate = a_gate(weight, bias, out_dtype=out_dtype, frozen=frozen)
    for rows in (0, 1, 5, 64, 65, 700):
        assert_multiplies(gate, weight, bias, rows)
    if not frozen:
        hidden = there(random(5, 64, dtype=dtype))
        assert gate(hidden).equal(moegate.router_gemm(hidden, gate.weight, gate.bias, out_dtype=out_dtype))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_changed_weight_takes_effect(frozen: bool) -> None:
    gate = a_gate(random(33, 64), frozen=frozen)
    with torch.no_grad():
        gate.weight.copy_(there(random(33, 64, seed=1)))
    assert_multiplies(gate, random(33, 64, seed=1))
    gate.weight = nn.Parameter(there(random(33, 64, seed=2)))
    assert_multiplies(gate, random(33, 64, seed=2))
    gate.load_state_dict({"weight": random(33, 64, seed=3)})
    assert_multiplies(gate, random(33, 64, seed=3))
    gate.weight.data.neg_()
    gate.refresh()
    assert_multiplies(gate, -random(33, 64, seed=3))
    gate.bfloat16()
    assert_multiplies(gate, -random(33, 64, seed=3).bfloat16())
    copy = pickle.loads(pickle.dumps(gate))
    assert_multiplies(copy, -random(33, 64, seed=3).bfloat16())


def test_a_frozen_weight_is_prepared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = record_prepared(monkeypatch)
    gate = a_gate(random(33, 64), frozen=True)
    for _ in range(3):
        assert_multiplies(gate, random(33, 64))
    assert len(prepared) == 1


def test_the_parameters_are_those_that_were_given() -> None:
    weight, bias = nn.Parameter(there(random(33, 64))), nn.Parameter(there(random(33)))
    gate = GateLinear(weight, bias)
    assert gate.weight is weight
    assert gate.bias is bias
    assert list(gate.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("has_bias", [False, True])
def test_compiled_in_one_graph_for_any_number_of_tokens(has_bias: bool) -> None:
    bias = random(33, seed=2) if has_bias else None
    gate = a_gate(random(33, 64, seed=1), bias, out_dtype=torch.bfloat16)
    compiled = torch.compile(gate, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 70, 1, 0, 9):
        hidden = there(random(rows, 64, seed=rows))
        assert compiled(hidden).equal(gate(hidden))


def test_wrappers() -> None:
    gate, hidden = a_gate(random(33, 64)), there(random(3, 5, 64))
    each = torch.stack([gate(part) for part in hidden])
    torch.testing.assert_close(torch.vmap(gate)(hidden), each, rtol=1e-5, atol=1e-5)  # another order of the sum


def test_no_gradient_is_told_once() -> None:
    gate, hidden = a_gate(random(33, 64)), there(random(5, 64)).requires_grad_()
    moegate.warn.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no gradient flows") as told:
        logits = [gate(hidden) for _ in range(3)]
    assert len(told) == 1
    assert not any(each.requires_grad for each in logits)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((1,), TypeError, "weight: got int"),
        ((torch.zeros(8, 16, dtype=torch.int32),), TypeError, "weight: got dtype int32"),
        ((torch.zeros(8),), ValueError, r"weight: got shape \[8\]; allowed: \[N, K\]"),
        ((torch.zeros(1025, 8),), ValueError, "weight: got 1025 rows; allowed: 1 to 1024"),
        ((torch.zeros(8, 0),), ValueError, r"weight: got shape \[N, 0\]"),
        ((torch.zeros(8, 16), torch.zeros(9)), ValueError, r"bias: got shape \[9\]; allowed: \[8\]"),
    ],
)
def test_what_is_no_gate(arguments: tuple[Any, ...], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        GateLinear(*(there(each) for each in arguments))


def test_what_is_no_option() -> None:
    for options, words in (
        ({"out_dtype": torch.float16}, "out_dtype: got torch.float16; allowed: float32, bfloat16"),
        ({"policy": "fast"}, "policy: got 'fast'"),
        ({"backend": "cudnn"}, "backend: got 'cudnn'"),
    ):
        with pytest.raises(ValueError, match=words):
            a_gate(random(8, 16), **options)
    with pytest.raises(ValueError, match=r"hidden: got shape \[4, 17\]; allowed: \[M, 16\]"):
        a_gate(random(8, 16))(there(random(4, 17)))


def test_the_plan_is_explained() -> None:
    gate = a_gate(random(33, 64), frozen=True)
    explained = gate.explain(3)
    kernels = [explained.kernel, *(each.kernel for each in explained.rejected)]
    assert len(set(kernels)) == len(kernels)
    assert not any("+" in kernel for kernel in kernels), "a selection does not run"
    times = [explained.expected_us, *(each.expected_us for each in explained.rejected)]
    assert set(times) == {None}, "what is measured is whole routes"
    assert gate.explain(100).kernel in kernels
    assert repr(gate).startswith("GateLinear(64 -> 33, out_dtype=float32, backend=")
