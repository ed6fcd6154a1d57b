"""Whole models of Transformers with moegate's routers: how they are switched on and off, and what goes on working."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import tiny_models
import torch
import transformers_routers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from moegate import functional
from moegate.integrations.transformers import classes, disable, enable, patch, probe, report, taken, unpatch
from moegate.integrations.transformers.forms import LEFT

IDS = torch.arange(2, 18).view(2, 8)
FAMILIES = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral")
LAYERS = {"qwen3_moe": 2, "deepseek_v3": 1, "gpt_oss": 2, "mixtral": 2}


@pytest.fixture
def routed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens that moegate routed, a call each; without trials of a class."""
    calls: list[int] = []
    route = functional.route

    def counted(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        if len(hidden) != probe.TOKENS:
            calls.append(len(hidden))
        return route(hidden, *arguments, **named)

    monkeypatch.setattr(taken, "route", counted)
    return calls


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.tiny_model(request.param).eval()


@pytest.fixture
def qwen() -> Any:
    return tiny_models.tiny_model("qwen3_moe").eval()


@pytest.fixture(autouse=True)
def _off_at_the_end() -> Iterator[None]:
    yield
    disable()


@torch.no_grad()
def logits_of(model: nn.Module, **named: Any) -> Tensor:
    found: Tensor = model(IDS, **named).logits
    return found


def routers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def hold_close(ours: Tensor, theirs: Tensor) -> None:
    """Models in float32, whose routers' float32 logits differ by the order of a sum of 64 terms."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_enable_and_disable_twice(model: Any, tmp_path: Path, routed: list[int]) -> None:
    """Models loaded between `enable` and `disable` are moegate's, and stay so; others are as they were."""
    model.save_pretrained(tmp_path)
    classes._agrees.clear()  # so that classes are tried while a model is being loaded
    layers, expected = LAYERS[model.config.model_type], logits_of(model)
    for _ in range(2):
        enable()
        enable()
        on = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        disable()
        disable()
        off = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert (len(report(on).taken), len(report(off).taken)) == (layers, 0)
        routed.clear()
        assert logits_of(off).equal(expected)
        assert routed == []
        hold_close(logits_of(on), expected)
        assert routed == [IDS.numel()] * layers
        for each in (on, off):  # Transformers replaces a class in lists that all models of a class share
            assert len(each(IDS, output_router_logits=True).router_logits) == layers


@pytest.mark.parametrize("model_type", sorted(tiny_models.TINY.keys() & set(transformers_routers.model_types())))
def test_every_family(model_type: str) -> None:
    """A whole model gives what it gives without moegate, and every router of a claimed class is moegate's."""
    model = tiny_models.tiny_model(model_type).eval()
    with torch.no_grad():
        expected = model(IDS)[0]
        takeover = patch(model)
        ours = model(IDS)[0]
    assert bool(takeover.taken) != (transformers_routers.class_name(model_type) in LEFT), takeover
    assert not (takeover.taken and takeover.left), takeover
    hold_close(ours, expected)


def test_patch_and_unpatch_twice(model: Any, routed: list[int]) -> None:
    expected = model(IDS, output_router_logits=True)
    parameters = dict(model.named_parameters())
    for _ in range(2):
        found = patch(model)
        assert str(found) == f"moegate routes {len(found.taken)} of {len(found.taken)} MoE layers"
        assert patch(model) == found
        with torch.no_grad():
            ours = model(IDS, output_router_logits=True)
        hold_close(ours.logits, expected.logits)
        for mine, theirs in zip(ours.router_logits, expected.router_logits, strict=True):
            hold_close(mine, theirs)
        assert len(routed) == len(found.taken) == LAYERS[model.config.model_type]
        assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
        unpatch(model)
        routed.clear()
        assert logits_of(model).equal(expected.logits)
        assert routed == []
        assert set(report(model).left.values()) == {"not patched"}


def test_a_patched_router_is_really_used(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other logits, other tokens: a routing by the negated weight changes what the model generates."""
    before = qwen.generate(IDS, max_new_tokens=8, do_sample=False)
    patch(qwen)
    assert qwen.generate(IDS, max_new_tokens=8, do_sample=False).equal(before)
    route = functional.route
    monkeypatch.setattr(taken, "route", lambda hidden, weight, *a, **named: route(hidden, -weight, *a, **named))
    assert not qwen.generate(IDS, max_new_tokens=8, do_sample=False).equal(before)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(model: Any, cache: str, routed: list[int]) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    before = model.generate(IDS, **options)
    patch(model)
    assert model.generate(IDS, **options).equal(before)
    assert routed


def test_compiled(model: Any, routed: list[int]) -> None:
    """One graph, without a break, for any number of tokens; routed by the operator, which no compiler looks into."""
    expected = [logits_of(model), model(IDS[:, :3]).logits.detach()]
    patch(model)
    compiled: Any = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for tokens, wanted in zip((IDS, IDS[:, :3]), expected, strict=True):
            hold_close(compiled(tokens, use_cache=False).logits, wanted)


def test_compiled_router_is_one_operator(qwen: Any) -> None:
    patch(qwen)
    router = routers_of(qwen)[0].requires_grad_(False)
    names: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled: Any = torch.compile(router, fullgraph=True, backend=backend)
    compiled(torch.randn(5, 64))
    assert [name for name in names if "moegate" in name] == ["moegate.route"]
    assert not [name for name in names if "topk" in name.lower() and "moegate" not in name]


@pytest.mark.parametrize("experts", ["eager", "batched_mm", "grouped_mm"])
def test_every_implementation_of_the_experts(qwen: Any, experts: str, routed: list[int]) -> None:
    qwen.set_experts_implementation(experts)
    expected = logits_of(qwen)
    patch(qwen)
    hold_close(logits_of(qwen), expected)
    assert len(routed) == 2


def test_save_and_load(model: Any, tmp_path: Path) -> None:
    names = set(model.state_dict())
    expected = logits_of(model)
    patch(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert logits_of(AutoModelForCausalLM.from_pretrained(tmp_path).eval()).equal(expected)


def test_copies(model: Any, routed: list[int]) -> None:
    """A deep copy and a pickled copy route by moegate too, with weights of their own."""
    patch(model)
    expected = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(report(other).taken) == len(report(model).taken)
        routed.clear()
        assert logits_of(other).equal(expected)
        assert routed
        routers_of(other)[0].weight.data.neg_()
        assert not logits_of(other).equal(expected)
        assert logits_of(model).equal(expected)


@pytest.mark.parametrize("first", ["patch", "hook"])
def test_accelerate_hooks(qwen: Any, first: str, routed: list[int]) -> None:
    """Parameters that are on meta between the calls; the hook keeps the forward that it wrapped."""
    expected = logits_of(qwen)
    if first == "patch":
        patch(qwen)
    accelerate.cpu_offload(qwen, execution_device=torch.device("cpu"))
    assert routers_of(qwen)[0].weight.is_meta
    if first == "hook":
        assert len(patch(qwen).taken) == 2
    hold_close(logits_of(qwen), expected)
    assert len(routed) == 2
    unpatch(qwen)
    routed.clear()
    assert logits_of(qwen).equal(expected)
    assert routed == []
    assert len(patch(qwen).taken) == 2


def test_layers_with_different_routers(tmp_path: Path, routed: list[int]) -> None:
    """DeepSeek-V4: layer 0 reads its ids from a table, layer 1 computes them; their classes tell which is which."""
    model = tiny_models.tiny_model("deepseek_v4").eval()
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    enable()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert str(report(loaded)) == "moegate routes 2 of 2 MoE layers"
    hold_close(logits_of(loaded), expected)
    assert len(routed) == 2


def test_lora_beside_the_router(qwen: Any, routed: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Rollouts are moegate's; a training step is Transformers' own, with the gradients of an unpatched model."""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    trained = peft.get_peft_model(qwen, config)
    grads = []
    for switch in (unpatch, patch):
        switch(trained)
        trained.zero_grad()
        routed.clear()
        trained(IDS, labels=IDS).loss.backward()
        assert routed == []
        grads.append([value.grad.clone() for value in trained.parameters() if value.grad is not None])
    assert grads[0]
    assert all(a.equal(b) for a, b in zip(*grads, strict=True))
    logits_of(trained)
    assert len(routed) == 2
    assert len(report(trained).taken) == 2
