"""The operator that compilers see: `torch.ops.moegate.route`."""

from __future__ import annotations

import pytest
import torch
from on_device import DEVICE, back, gate_there, there
from routers import SPECS, generator, route_arguments, tensors_of

from moegate import Gate, ops
from moegate.routing import RouterTensors, Routing

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
    arguments = (*arguments, True, True, None, "measured")
    torch.library.opcheck(torch.ops.moegate.route.default, arguments)
    assert hidden.device.type == DEVICE.type
