"""`MoEGate` by moegate's GEMM, and how its routing reaches the `TopK` of the same call, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang_layers import EXPERTS, GROUPED, HIDDEN, TOP_K, gate_of, hidden_of, top_k_of
from sglang_process import in_another_process
from torch import Tensor

import moegate
from moegate import RouterSpec
from moegate.contract import bounds, reference
from moegate.integrations.sglang import tickets
from moegate.routing import RouterTensors

SPEC = RouterSpec(
    HIDDEN,
    EXPERTS,
    TOP_K,
    scoring_func="sigmoid",
    correction_bias="score",
    n_group=8,
    topk_group=4,
    renormalize=True,
    renormalize_eps=1e-20,
)


def layer(**config: Any) -> tuple[Any, Any]:
    """A gate and its selection, which know each other since one forward pass."""
    gate = gate_of(**config)
    top_k = top_k_of(gate.e_score_correction_bias, **GROUPED)
    top_k(hidden_of(1), gate(hidden_of(1)))
    return gate, top_k


def routing_on(logits: Tensor) -> Any:
    ticket = logits.__dict__.get("_moegate_ticket")
    return None if ticket is None else ticket.routing


def selected(logits: Tensor, gate: Any) -> Tensor:
    """The ids that the logits mean."""
    return moegate.select(logits, SPEC, e_score_correction_bias=gate.e_score_correction_bias.detach()).topk_ids


def own(gate: Any, hidden: Tensor) -> Any:
    return type(gate).forward.__wrapped__(gate, hidden)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", ["float32", "engine"])
def test_logits_row_by_row(weight: torch.dtype, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 where SGLang's are: of a float32 weight here, and of any weight on a GPU; else if MOEGATE_LOGITS says."""
    monkeypatch.setenv("MOEGATE_LOGITS", wanted)
    gate, top_k = layer(dtype=weight, router_fp32=weight == torch.float32)
    dtype = torch.float32 if wanted == "float32" or weight == torch.float32 else torch.bfloat16
    spec = SPEC if dtype == torch.float32 else RouterSpec(HIDDEN, EXPERTS, 1, logits_dtype="bfloat16")
    for tokens in (*range(20), 64, 65, 200):
        hidden = hidden_of(tokens, seed=tokens)
        logits = gate(hidden)
        assert routing_on(logits) is not None
        assert logits.dtype == dtype
        exact = reference.router_logits(hidden, gate.weight, RouterSpec(HIDDEN, EXPERTS, 1), RouterTensors())
        allowed = bounds.logit_bound(hidden, gate.weight, exact, spec, RouterTensors())
        assert ((logits.double() - exact).abs() <= allowed).all()
        assert top_k(hidden, logits).topk_ids.equal(selected(logits, gate))
        if wanted == "engine":
            assert own(gate, hidden).dtype == dtype


def test_the_second_pass_is_one_call() -> None:
    gate = gate_of()
    top_k = top_k_of(gate.e_score_correction_bias, **GROUPED)
    first = gate(hidden_of(5))
    assert routing_on(first) is None
    top_k(hidden_of(5), first)
    second = gate(hidden_of(5))
    routing = routing_on(second)
    assert second.equal(first)
    output = top_k(hidden_of(5), second)
    assert output.topk_ids is routing.topk_ids
    assert output.topk_weights is routing.topk_weights
    assert output.router_logits is second
    assert output.topk_ids.equal(selected(second, gate))


def changed(logits: Tensor, how: str) -> Tensor:
    """The logits with another content, or others in their place."""
    if how == "in place":
        return logits.neg_()
    if how == "through a view":
        logits[2:].view(-1).mul_(-1)
    elif how == "by index":
        logits[:, 3] = 9.0
    elif how == "through a slice of a chunk":
        logits.chunk(2)[0].zero_()
    elif how == "as the fake dispatch":
        logits.uniform_(5, 10)
    elif how == "clone":
        return -logits.clone()
    elif how == "slice":
        return logits[1:]
    elif how == "cat":
        return torch.cat([logits[2:], logits[:2]])
    elif how == "cast":
        return logits.float().bfloat16().neg()
    elif how == "out=":
        torch.neg(logits.clone(), out=logits)
    return logits


@pytest.mark.parametrize(
    "how",
    [
        "in place",
        "through a view",
        "by index",
        "through a slice of a chunk",
        "as the fake dispatch",
        "clone",
        "slice",
        "cat",
        "cast",
        "out=",
    ],
)
def test_changed_logits_are_routed_anew(how: str) -> None:
    gate, top_k = layer()
    hidden = hidden_of(6)
    before = selected(gate(hidden), gate)
    logits = changed(gate(hidden), how)
    output = top_k(hidden[: len(logits)], logits)
    assert output.topk_ids.equal(selected(logits, gate))
    assert not output.topk_ids.equal(before[: len(logits)])  # so a routing of the old logits would be seen


def test_logits_of_several_calls_in_any_order() -> None:
    gate, top_k = layer()
    inputs = [hidden_of(6, seed=seed) for seed in range(4)]
    logits = [gate(hidden) for hidden in inputs]
    for index in (2, 0, 3, 1):
        assert top_k(inputs[index], logits[index]).topk_ids.equal(selected(logits[index], gate))


def test_logits_for_another_selection() -> None:
    """Of another layer, which no gate's routing is for."""
    gate, _ = layer()
    other = top_k_of(gate.e_score_correction_bias, **GROUPED, renormalize=False)
    logits = gate(hidden_of(5))
    assert routing_on(logits) is not None
    weights = other(hidden_of(5), logits).topk_weights
    assert (weights.sum(dim=-1) > 1.5).all()
    assert routing_on(gate(hidden_of(5))) is not None  # the gate goes on to serve its own


def test_a_routing_is_given_once() -> None:
    """SGLang writes -1 to the ids of padding: a second selection of the same logits must not see that."""
    gate, top_k = layer()
    hidden, logits = hidden_of(6), gate(hidden_of(6))
    padded = top_k(hidden, logits, num_token_non_padded=torch.tensor(2, dtype=torch.int32))
    assert (padded.topk_ids[2:] == -1).all()
    assert top_k(hidden, logits).topk_ids.equal(selected(logits, gate))


def test_a_ticket_of_an_older_version_is_none() -> None:
    gate, _ = layer()
    logits = gate(hidden_of(2))
    assert not logits.is_inference(), "PyTorch counts no writes to an inference tensor"
    logits.add_(0)
    assert tickets.take(logits) is None


def test_another_weight_or_bias_takes_effect() -> None:
    gate, top_k = layer()
    hidden = hidden_of(5)
    with torch.inference_mode(False), torch.no_grad():
        gate.weight.data.copy_(gate_of(seed=1).weight.data)  # as SGLang reloads
    assert gate(hidden).equal(gate_of(seed=1)(hidden))
    gate.weight = gate_of(seed=2).weight
    assert gate(hidden).equal(gate_of(seed=2)(hidden))
    top_k.topk_config.correction_bias = gate_of(seed=3).e_score_correction_bias
    gate.e_score_correction_bias = top_k.topk_config.correction_bias
    for _ in range(3):
        logits = gate(hidden)
        assert top_k(hidden, logits).topk_ids.equal(selected(logits, gate))
    assert routing_on(gate(hidden)) is not None


@pytest.mark.parametrize("what", ["deterministic", "float16", "three dimensions"])
def test_gates_that_stay_sglangs(what: str) -> None:
    from sglang.srt.runtime_context import get_context

    with get_context().override_server_args(enable_deterministic_inference=what == "deterministic"):
        dtype = torch.float16 if what == "float16" else torch.bfloat16
        gate, hidden = gate_of(dtype), hidden_of(4, dtype=dtype)
        hidden = hidden.view(2, 2, HIDDEN) if what == "three dimensions" else hidden
        logits = gate(hidden)
        assert not logits.__dict__
        assert logits.equal(own(gate, hidden))


def test_packed_weights_stay_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AMX, SGLang packs the weight."""
    gate = gate_of()
    gate.use_intel_amx_backend = True
    packed = torch.zeros(5, EXPERTS)
    monkeypatch.setattr(torch.ops.sgl_kernel, "weight_packed_linear", lambda *_: packed, raising=False)
    assert gate(hidden_of(5)) is packed


COMPILED = """
import torch
torch._dynamo.config.disable = False
from sglang.srt.plugins import load_plugins
load_plugins()
from moegate.integrations.sglang.gate import GateOfLayer
from moegate.integrations.sglang.selection import Selection
from sglang.srt.runtime_context import get_context
from sglang_layers import GROUPED, gate_of, hidden_of, top_k_of

gate, hidden = gate_of(), hidden_of(4)
with get_context().override_server_args(), torch.inference_mode():
    top_k = top_k_of(gate.e_score_correction_bias, **GROUPED)
    top_k(hidden, gate(hidden))
    calls = []
    def counted(function):
        return lambda *given, **named: (calls.append(function.__name__), function(*given, **named))[1]
    GateOfLayer.logits, Selection.route = counted(GateOfLayer.logits), counted(Selection.route)
    compiled = torch.compile(gate, backend="eager", fullgraph=True)
    logits = compiled(hidden)
    print("compiled", logits.__dict__, logits.equal(torch.nn.functional.linear(hidden, gate.weight)))
    seen = []
    def look(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph
    torch.compile(lambda x: top_k(x, gate(x)).topk_ids, backend=look)(hidden)
    print("seen", any("topk" in name for name in seen), "calls", calls)
    gate(hidden)
    print("eager", calls)
"""


def test_compiled_code_is_sglangs() -> None:
    printed = in_another_process(COMPILED, MOEGATE="1")
    assert "compiled {} True" in printed
    assert "seen True calls []" in printed
    assert "eager ['logits']" in printed
