"""The operators that compilers see: `torch.ops.moegate.route`, `router_gemm` and `select`."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from on_device import DEVICE, back, gate_there, there
from routers import SPECS, generator, route_arguments, tensors_of
from torch import Tensor

from moegate import Gate, ops, route, router_gemm, select
from moegate.choice.dispatch import Options, dispatch_of
from moegate.routing import RouterTensors, Routing, inputs_of

COMPILED = ["sigmoid with bias in groups", "sigmoid with shared gates", "softmax with bias and zero experts", "hash"]


def a_gate(name: str, *, frozen: bool) -> Gate:
    spec = SPECS[name]
    weight = torch.randn(spec.num_gate_rows, spec.hidden_size, generator=generator(1))
    given = {name: tensor for name, tensor in tensors_of(spec)._asdict().items() if tensor is not None}
    return gate_there(spec, weight, **given, frozen=frozen)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph_for_any_number_of_tokens(name: str, frozen: bool) -> None:
    torch.compiler.reset()
    gate, spec = a_gate(name, frozen=frozen), SPECS[name]
    compiled = torch.compile(gate, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 70, 1, 0, 9):
        hidden = there(torch.randn(rows, spec.hidden_size, generator=generator(rows)))
        ids = there(route_arguments(spec, tensors_of(spec), rows).get("input_ids"))
        eager, got = (back(run(hidden, input_ids=ids, return_logits=True)) for run in (gate, compiled))
        assert got.topk_ids.equal(eager.topk_ids)
        for mine, theirs in zip(got[1:], eager[1:], strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None and theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)  # a packed weight rounds differently


def test_compiled_into_given_outputs() -> None:
    torch.compiler.reset()
    gate = a_gate("sigmoid with bias in groups", frozen=False)
    hidden = there(torch.randn(5, gate.spec.hidden_size, generator=generator(5)))
    expected = gate(hidden)
    out = Routing(torch.full_like(expected.topk_ids, 77), torch.full_like(expected.topk_weights, 77))
    got = torch.compile(gate, fullgraph=True, backend="aot_eager")(hidden, out=out)
    assert got.topk_ids.equal(expected.topk_ids)
    assert out.topk_ids.equal(expected.topk_ids)
    assert out.topk_weights.equal(got.topk_weights)


@pytest.mark.parametrize("name", SPECS)
def test_the_operator_is_what_it_says(name: str) -> None:
    """PyTorch's own checks of an operator: schema, fake implementation, autograd and compilation."""
    spec, gate = SPECS[name], a_gate(name, frozen=False)
    hidden = there(torch.randn(4, spec.hidden_size, generator=generator(2)))
    given = route_arguments(spec, tensors_of(spec), 4)
    tensors = [there(given.get(field)) for field in RouterTensors._fields]
    arguments = (hidden, gate.weight.detach(), ops.spec_text(spec), *tensors, there(given.get("input_ids")))
    for padding in (None, there(torch.tensor([False, True, False, True])), there(torch.tensor(3, dtype=torch.int32))):
        torch.library.opcheck(torch.ops.moegate.route.default, (*arguments, padding, True, True, None, "measured"))
    assert hidden.device.type == DEVICE.type


@pytest.mark.parametrize("name", COMPILED)
def test_functions_compile_in_one_graph_for_any_number_of_tokens(name: str) -> None:
    """The whole, and the halves one after the other, as engines call them; to the bit of eager calls."""
    torch.compiler.reset()
    spec, tensors = SPECS[name], tensors_of(SPECS[name])
    weight = there(torch.randn(spec.num_gate_rows, spec.hidden_size, generator=generator(1)))
    small: dict[str, Any] = {name: there(part) for name, part in tensors._asdict().items() if part is not None}
    of_selection = {wanted.name for wanted in inputs_of(spec) if wanted.half == "selection"}

    def whole(hidden: Tensor, ids: Tensor | None, padding: Tensor | None) -> Routing:
        return route(hidden, weight, spec, **small, input_ids=ids, padding=padding, return_logits=True)

    def halves(hidden: Tensor, ids: Tensor | None, padding: Tensor | None) -> tuple[Tensor | None, ...]:
        logits = router_gemm(hidden, weight, small.get("bias"))
        given = {name: part for name, part in small.items() if name in of_selection}
        return logits, *select(logits, spec, **given, input_ids=ids, padding=padding)

    for function in (whole, halves):
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        for rows in (3, 70, 1, 0, 9):
            hidden = there(torch.randn(rows, spec.hidden_size, generator=generator(rows)))
            ids: Any = there(route_arguments(spec, tensors, rows).get("input_ids"))
            for padding in (None, there(torch.arange(rows) % 3 == 1)):
                got, expected = (run(hidden, ids, padding) for run in (compiled, function))
                for mine, theirs in zip(got, expected, strict=True):
                    assert mine is theirs or (mine is not None and theirs is not None and mine.equal(theirs))


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_the_operators_of_the_halves_are_what_they_say(name: str, out_dtype: torch.dtype) -> None:
    spec, given = SPECS[name], route_arguments(SPECS[name], tensors_of(SPECS[name]), 4)
    hidden = there(torch.randn(4, spec.hidden_size, generator=generator(2)).bfloat16())
    weight = there(torch.randn(spec.num_gate_rows, spec.hidden_size, generator=generator(3)).bfloat16())
    options = (True, True, None, "measured")
    asked = (hidden, weight, there(given.get("bias")), out_dtype, *options)
    torch.library.opcheck(torch.ops.moegate.router_gemm.default, asked)
    logits = torch.ops.moegate.router_gemm(*asked)
    assert logits.dtype == out_dtype
    names = ("e_score_correction_bias", "per_expert_scale", "global_scale", "tid2eid", "input_ids")
    small = [there(given.get(name)) for name in names]
    for padding in (None, there(torch.tensor([False, True, False, True]))):
        torch.library.opcheck(
            torch.ops.moegate.select.default, (logits, ops.spec_text(spec), *small, padding, *options)
        )


def test_the_halves_have_the_bits_of_the_whole() -> None:
    spec = SPECS["sigmoid with bias in groups"]
    own = tensors_of(spec).e_score_correction_bias
    assert own is not None
    bias = there(own)
    weight = there(torch.randn(spec.num_gate_rows, spec.hidden_size, generator=generator(1)).bfloat16())
    for rows in (1, 17, 64, 65, 700):
        hidden = there(torch.randn(rows, spec.hidden_size, generator=generator(rows)).bfloat16())
        expected = route(hidden, weight, spec, e_score_correction_bias=bias, return_logits=True)
        logits = router_gemm(hidden, weight)
        assert expected.logits is not None
        assert logits.equal(expected.logits)
        got = select(logits, spec, e_score_correction_bias=bias)
        assert got.topk_ids.equal(expected.topk_ids)
        assert got.topk_weights.equal(expected.topk_weights)


def test_a_spec_is_read_from_its_text_once() -> None:
    gate, hidden = a_gate("sigmoid with bias in groups", frozen=False), there(torch.randn(3, 64))
    bias = gate.e_score_correction_bias
    tensors = RouterTensors(e_score_correction_bias=None if bias is None else bias.detach())
    for _ in range(3):
        ops.route(hidden, gate.weight.detach(), gate.spec, tensors, None, None, Options())
    before = ops._spec.cache_info().misses, dispatch_of.cache_info().misses
    ops.route(hidden, gate.weight.detach(), gate.spec, tensors, None, None, Options())
    assert (ops._spec.cache_info().misses, dispatch_of.cache_info().misses) == before


def test_the_text_of_a_spec_is_the_spec() -> None:
    for spec in SPECS.values():
        assert ops._spec(ops.spec_text(spec)) == spec
        whole = json.dumps(dataclasses.asdict(spec))  # as compiled programs of earlier versions have it
        assert ops._spec(whole) == spec
