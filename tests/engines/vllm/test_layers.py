"""A gate and a router that vLLM's runner holds, computed by moegate at once."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm_layers import EXPERTS, HIDDEN, ROUTERS, hold_engine, runner_of, tensors_of

from moegate import RouterSpec, Routing
from moegate.contract.verify import verify_logits, verify_routing
from moegate.integrations.takeover import LeftToEngineError
from moegate.integrations.vllm.gate_linear import MoegateGateLinear
from moegate.integrations.vllm.routed_layer import take_over
from moegate.integrations.vllm.routed_logits import RoutedLogits
from moegate.integrations.vllm.weights import keep_weight
from moegate.routing import RouterTensors

TOKENS = 50
FUSED = "gate and selection"
pytestmark = pytest.mark.usefixtures("vllm_config")


def gate_of(
    kind: Any = MoegateGateLinear, dtype: torch.dtype = torch.bfloat16, bias: bool = False, **options: Any
) -> Any:
    """A gate with weights that vLLM has loaded."""
    gate = kind(HIDDEN, EXPERTS, bias=bias, params_dtype=dtype, prefix="gate", **options)
    keep_weight(gate)
    generator = torch.Generator().manual_seed(2)
    gate.weight.data.copy_(torch.randn(EXPERTS, HIDDEN, generator=generator) / 8)
    if bias:
        gate.bias.data.copy_(torch.randn(EXPERTS, generator=generator))
    gate.quant_method.process_weights_after_loading(gate)
    return gate


def hidden(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)


def routed(runner: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the runner does in a call: (logits, weights, ids)."""
    logits, _ = runner.gate(x)
    weights, ids = runner.router.select_experts(x, logits, runner._quant_method.topk_indices_dtype)
    return logits, weights, ids


def hold(runner: Any, x: Tensor, spec: RouterSpec) -> None:
    """Holds moegate's logits and routing to the contract."""
    logits, weights, ids = routed(runner, x)
    assert isinstance(logits, RoutedLogits)
    plain = logits.as_subclass(Tensor)
    tensors = tensors_of(runner.router)
    bias = runner.gate.bias
    assert not verify_logits(
        plain, x, runner.gate.weight.data, spec, RouterTensors(bias=None if bias is None else bias.data)
    ).problems
    assert not verify_routing(Routing(ids, weights), plain, replace(spec, linear_bias=False), tensors).problems


@pytest.mark.parametrize("kind", [MoegateGateLinear, ReplicatedLinear])
@pytest.mark.parametrize("name", ROUTERS)
def test_gate_and_selection(name: str, kind: Any) -> None:
    make, spec = ROUTERS[name]
    runner = runner_of(make(), gate_of(kind))
    assert take_over(runner) == FUSED
    hold(runner, hidden(), replace(spec, logits_dtype="bfloat16"))


@pytest.mark.parametrize(
    ("options", "logits_dtype"),
    [
        ({"out_dtype": torch.float32}, "float32"),
        ({"dtype": torch.float32, "out_dtype": torch.float32}, "float32"),
        ({"dtype": torch.float32, "out_dtype": torch.bfloat16}, "bfloat16"),
        ({"bias": True}, "bfloat16"),
    ],
)
def test_forms_of_gates(options: dict[str, Any], logits_dtype: Any) -> None:
    make, spec = ROUTERS["groups"]
    runner = runner_of(make(), gate_of(**options))
    assert take_over(runner) == FUSED
    hold(runner, hidden(), replace(spec, logits_dtype=logits_dtype, linear_bias=options.get("bias", False)))


@pytest.mark.parametrize("name", ["softmax on a CPU", "groups on a CPU"])
def test_the_same_experts_as_vllm(name: str) -> None:
    make, spec = ROUTERS[name]
    x = hidden(torch.float32)
    theirs = gate_of(GateLinear, dtype=torch.float32)(x)[0]
    engine_weights, engine_ids = make()._compute_routing(x, theirs, None)
    runner = runner_of(make(), gate_of(dtype=torch.float32))
    take_over(runner)
    logits, weights, ids = routed(runner, x)
    torch.testing.assert_close(logits.as_subclass(Tensor), theirs, rtol=0, atol=1e-5)
    hold_engine(engine_ids, engine_weights, theirs, spec, tensors_of(runner.router))
    same = ids.sort(dim=-1).values == engine_ids.sort(dim=-1).values
    assert same.all()
    torch.testing.assert_close(weights.sort(dim=-1).values, engine_weights.sort(dim=-1).values, rtol=1e-4, atol=1e-6)


def test_float32_logits_by_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGATE_LOGITS", "float32")
    make, spec = ROUTERS["groups"]
    runner = runner_of(make(), gate_of())
    take_over(runner)
    hold(runner, hidden(), spec)


def test_ids_in_int64() -> None:
    make, spec = ROUTERS["groups"]
    runner = runner_of(make(), gate_of(), topk_indices_dtype=torch.int64)
    take_over(runner)
    hold(runner, hidden(), replace(spec, topk_ids_dtype="int64", logits_dtype="bfloat16"))
    # Before vLLM would cast them, by a kernel of its own.
    assert runner.router._compute_routing(hidden(), runner.gate(hidden())[0], torch.int64)[1].dtype == torch.int64


def test_a_routing_stays_with_its_logits() -> None:
    """Two calls, selected from in the other order, as two micro-batches may be."""
    runner = runner_of(ROUTERS["softmax on a CPU"][0](), gate_of())
    take_over(runner)
    first, second = hidden()[:9], hidden()[9:18]
    expected = [routed(runner, x)[2] for x in (first, second)]
    assert not expected[0].equal(expected[1])
    logits = [runner.gate(x)[0] for x in (first, second)]
    for index in (1, 0):
        _, ids = runner.router.select_experts(first, logits[index], None)
        assert ids.equal(expected[index])


def test_changed_logits_are_selected_from_anew() -> None:
    runner = runner_of(ROUTERS["softmax on a CPU"][0](), gate_of())
    take_over(runner)
    logits, _ = runner.gate(hidden())
    logits.neg_()
    _, ids = runner.router.select_experts(hidden(), logits, None)
    expected = (-runner.gate(hidden())[0]).topk(4, dim=-1).indices
    assert ids.sort(dim=-1).values.equal(expected.sort(dim=-1).values.int())


def test_a_weight_that_is_written_or_replaced_is_followed() -> None:
    runner = runner_of(ROUTERS["softmax on a CPU"][0](), gate_of())
    take_over(runner)
    before = routed(runner, hidden())[0].as_subclass(Tensor)
    runner.gate.weight.data.neg_()
    assert routed(runner, hidden())[0].as_subclass(Tensor).equal(-before)
    runner.gate.weight.data = -runner.gate.weight.data
    assert routed(runner, hidden())[0].as_subclass(Tensor).equal(before)
    runner.gate.weight = nn.Parameter(-runner.gate.weight.data, requires_grad=False)
    assert routed(runner, hidden())[0].as_subclass(Tensor).equal(-before)


def test_a_bias_that_moves_is_followed() -> None:
    """Offloading gives a parameter other memory."""
    router = ROUTERS["sigmoid with a bias"][0]()
    router.e_score_correction_bias = nn.Parameter(router.e_score_correction_bias, requires_grad=False)
    runner = runner_of(router, gate_of())
    take_over(runner)
    router.e_score_correction_bias.data = torch.where(torch.arange(EXPERTS) == 7, 9.0, -1.0)
    assert (routed(runner, hidden())[2][:, 0] == 7).all()


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize(
    ("name", "is_heeded"), [("softmax", True), ("sqrtsoftplus", True), ("groups", False), ("softmax on a CPU", False)]
)
def test_padding(
    name: str, is_heeded: bool, gate: bool, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of padding are left out where vLLM's own router leaves them out, and unless the switch is off."""
    runner = runner_of(ROUTERS[name][0](), gate_of() if gate else None)
    take_over(runner)
    mask = torch.zeros(64, dtype=torch.bool)
    mask[40:] = True
    calls = runner.gate or (lambda x: (x[:, :EXPERTS].float(), None))
    for switch in (True, False):
        monkeypatch.setattr(envs, "VLLM_MOE_SKIP_PADDING", switch, raising=False)
        with set_forward_context(None, vllm_config, is_padding=mask[:TOKENS]):
            weights, ids = runner.router.select_experts(hidden(), calls(hidden())[0], None)
        is_padding = mask[:TOKENS] if is_heeded and switch else torch.zeros(TOKENS, dtype=torch.bool)
        assert (ids == -1).all(dim=-1).equal(is_padding)
        assert (weights == 0).all(dim=-1).equal(is_padding)


def test_padding_of_groups_where_vllm_asks_for_it(vllm_config: VllmConfig) -> None:
    router = ROUTERS["groups"][0]()
    router.skip_padding = True
    runner = runner_of(router, gate_of())
    take_over(runner)
    mask = torch.arange(TOKENS) >= 40
    with set_forward_context(None, vllm_config, is_padding=mask):
        assert (routed(runner, hidden())[2] == -1).all(dim=-1).equal(mask)


def test_a_mask_of_fewer_rows_is_no_mask(vllm_config: VllmConfig) -> None:
    runner = runner_of(ROUTERS["softmax"][0](), gate_of())
    take_over(runner)
    with set_forward_context(None, vllm_config, is_padding=torch.ones(TOKENS - 1, dtype=torch.bool)):
        assert (routed(runner, hidden())[2] >= 0).all()


class OtherGate(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x[:, :EXPERTS].float(), None


def quantised() -> Any:
    gate = gate_of()
    gate.quant_method = SimpleNamespace()
    return gate


def with_lora() -> Any:
    wrapper = nn.Module()
    wrapper.base_layer = gate_of()
    return wrapper


@pytest.mark.parametrize(
    ("make", "changes", "reason"),
    [
        (quantised, {}, "quantised gate"),
        (with_lora, {}, "a gate with LoRA"),
        (lambda: gate_of(dtype=torch.float16), {}, "float16 logits"),
        (gate_of, {"is_monolithic": True}, "experts that route themselves"),
        (gate_of, {"_fse_fuse_gate": True}, "a gate that is joined with that of the shared expert"),
        (lambda: None, {"in_dtype": torch.float16}, "float16 logits"),
    ],
)
def test_left_to_vllm(make: Any, changes: dict[str, Any], reason: str) -> None:
    runner = runner_of(ROUTERS["softmax on a CPU"][0](), make(), **changes)
    with pytest.raises(LeftToEngineError, match=f"^{reason}$"):
        take_over(runner)
    assert "_compute_routing" not in vars(runner.router)
    assert runner.gate is None or "forward" not in vars(runner.gate)


def test_batch_invariant_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(envs, "VLLM_BATCH_INVARIANT", True, raising=False)
    with pytest.raises(LeftToEngineError, match=r"^batch-invariant mode$"):
        take_over(runner_of(ROUTERS["softmax"][0](), gate_of()))
    assert not gate_of()._moegate_computes


@pytest.mark.parametrize(
    ("make", "changes", "why"),
    [
        (OtherGate, {}, "the gate is a OtherGate"),
        (lambda: gate_of(bias=True, skip_bias_add=True), {}, "the gate's bias is added later"),
        (gate_of, {"do_naive_dispatch_combine": True}, "the logits of all ranks are gathered"),
        (gate_of, {"pcp_size": 2}, "the logits of all ranks are gathered"),
    ],
)
def test_the_selection_alone(make: Any, changes: dict[str, Any], why: str) -> None:
    runner = runner_of(ROUTERS["groups"][0](), make(), **changes)
    assert take_over(runner) == f"selection alone: {why}"
    assert "forward" not in vars(runner.gate)
    logits, weights, ids = routed(runner, hidden())
    assert not isinstance(logits, RoutedLogits)
    verdict = verify_routing(Routing(ids, weights), logits, ROUTERS["groups"][1], tensors_of(runner.router))
    assert not verdict.problems
