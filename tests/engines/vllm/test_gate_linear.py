"""Gates that a model calls itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.model_executor.layers import linear
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import LinearMethodBase

from moegate import RouterSpec
from moegate.contract.verify import verify_logits
from moegate.integrations.vllm.gate_linear import MoegateGateLinear
from moegate.routing import RouterTensors

HIDDEN, EXPERTS, TOKENS = 64, 32, 9
pytestmark = pytest.mark.usefixtures("vllm_config")


def loaded(gate: Any) -> Any:
    generator = torch.Generator().manual_seed(2)
    for parameter in gate.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    gate.quant_method.process_weights_after_loading(gate)
    return gate


def hidden() -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()


def gate_of(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return loaded(MoegateGateLinear(HIDDEN, EXPERTS, params_dtype=dtype, prefix="gate", **options))


@pytest.mark.parametrize(
    ("options", "logits_dtype"),
    [
        ({}, "bfloat16"),
        ({"out_dtype": torch.float32}, "float32"),
        ({"dtype": torch.float32, "out_dtype": torch.float32}, "float32"),
        ({"bias": True}, "bfloat16"),
    ],
)
def test_logits(options: dict[str, Any], logits_dtype: Any) -> None:
    gate = gate_of(**options)
    logits, output_bias = gate(hidden())
    assert output_bias is None
    spec = RouterSpec(HIDDEN, EXPERTS, 1, logits_dtype=logits_dtype, linear_bias=gate.bias is not None)
    tensors = RouterTensors(bias=None if gate.bias is None else gate.bias.data)
    assert not verify_logits(logits, hidden(), gate.weight.data, spec, tensors).problems


def test_without_a_tuple() -> None:
    assert gate_of(return_bias=False)(hidden()).equal(gate_of()(hidden())[0])


def test_a_dtype_that_the_model_sets_later() -> None:
    gate = gate_of()
    gate.set_out_dtype(torch.float32)
    assert gate(hidden())[0].dtype == torch.float32


def test_the_weight_is_read_in_each_call() -> None:
    gate = gate_of()
    before = gate(hidden())[0]
    gate.weight.data.neg_()
    assert gate(hidden())[0].equal(-before)


def test_the_weight_stays_after_each_load() -> None:
    """On a CPU vLLM empties the parameter when it has packed the weight."""
    gate = gate_of()
    weight, before = gate.weight, gate.weight.data.clone()
    assert weight.shape == (EXPERTS, HIDDEN)
    gate.quant_method.process_weights_after_loading(gate)
    assert gate.weight is weight
    assert gate.weight.data.equal(before)
    assert gate.quant_method.apply(gate, hidden(), None).shape == (TOKENS, EXPERTS)


def test_a_compiler_sees_one_operator() -> None:
    """For any number of tokens, as vLLM compiles."""
    gate, graphs = gate_of(), []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: gate(x)[0], backend=backend, fullgraph=True, dynamic=True)
    for tokens in (TOKENS, 3):
        x = hidden()[:tokens]
        torch._dynamo.maybe_mark_dynamic(x, 0)
        assert compiled(x).equal(gate(x)[0])
    calls: list[Any] = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert [call for call in calls if "moegate" in str(call)] == [torch.ops.moegate.router_gemm]
    assert not [call for call in calls if call in (torch.nn.functional.linear, torch.matmul, torch.mm)]
    assert len(graphs) == 1


def plain(**options: Any) -> Any:
    return loaded(GateLinear(HIDDEN, EXPERTS, prefix="gate", **options))


@pytest.mark.parametrize("options", [{"params_dtype": torch.float16}, {"bias": True, "skip_bias_add": True}])
def test_left_to_vllm(options: dict[str, Any]) -> None:
    """The same bits as vLLM's own gate."""
    options = {"params_dtype": torch.bfloat16, **options}
    x = hidden().to(options["params_dtype"])
    ours = loaded(MoegateGateLinear(HIDDEN, EXPERTS, prefix="gate", **options))(x)
    theirs = plain(**options)(x)
    assert ours[0].equal(theirs[0])
    assert (ours[1] is None) == (theirs[1] is None)


class Quantised(LinearMethodBase):  # type: ignore[misc]
    """A method whose result nobody else computes."""

    def create_weights(self, layer: nn.Module, *sizes: object, **options: object) -> None:
        layer.register_parameter("weight", nn.Parameter(torch.zeros(EXPERTS, HIDDEN), requires_grad=False))

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.full((len(x), EXPERTS), 7.0)


def test_a_quantised_gate_is_left_to_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "UnquantizedLinearMethod", Quantised)
    assert (gate_of()(hidden())[0] == 7.0).all()


def test_too_many_rows_are_left_to_vllm() -> None:
    gate = loaded(MoegateGateLinear(HIDDEN, 1025, params_dtype=torch.bfloat16, prefix="gate"))
    assert gate(hidden())[0].shape == (TOKENS, 1025)
