"""What others do to routers, before or after moegate comes: the class's own result, and `report` says why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import accelerate
import peft
import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.monkey_patching import apply_patches, get_patch_mapping, register_patch_mapping

from moegate.integrations.transformers import classes, disable, enable, patch, report, unpatch

IDS = torch.arange(2, 18).view(2, 8)
Router: Any = modeling_qwen3_moe.Qwen3MoeTopKRouter


@pytest.fixture(autouse=True)
def _off_at_the_end() -> Iterator[None]:
    yield
    disable()


def tiny(model_type: str = "qwen3_moe", **settings: Any) -> Any:
    return tiny_models.tiny_model(model_type, **settings).eval()


def router_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if type(module).__name__.lower().endswith(("router", "v1gate")))


@torch.no_grad()
def logits_of(model: nn.Module, **named: Any) -> Tensor:
    found: Tensor = model(**(named or {"input_ids": IDS})).logits
    return found


def hold_left(model: Any, reason: str) -> None:
    """Bit for bit what the model computes without moegate, with the reason in the report."""
    ours = logits_of(model)
    assert reason in str(report(model)), report(model)
    unpatch(model)
    assert ours.equal(logits_of(model))


@pytest.mark.parametrize("model_type", ["gemma4_text", "afmoe", "hunyuan_v1_moe"])
@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora_inside_of_a_router(model_type: str, first: str) -> None:
    model = tiny(model_type)
    layer = {"gemma4_text": "proj", "afmoe": "gate", "hunyuan_v1_moe": "wg"}[model_type]
    steps = [
        lambda: patch(model),
        lambda: peft.get_peft_model(
            model, peft.LoraConfig(target_modules=rf".*\.{layer}", init_lora_weights=False)
        ).eval(),
    ]
    for step in steps if first == "patch" else reversed(steps):
        step()
    hold_left(model, f"its {layer} was replaced")


def test_hooks_inside_of_a_router() -> None:
    model = tiny("gemma4_text")
    patch(model)
    for router in (layer.router for layer in model.model.layers):
        router.proj.register_forward_hook(lambda module, given, output: -output)
    hold_left(model, "its proj has hooks")


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("minimax_m2", {"scoring_func": "softmax"}),
        ("longcat_flash", {"router_bias": True}),
        ("minimax", {"scoring_func": "sigmoid"}),
    ],
)
def test_a_config_that_the_class_does_not_follow(model_type: str, settings: dict[str, Any]) -> None:
    """The class is tried on random numbers; a word of the config that it does not read gives another router."""
    model = tiny(model_type)
    for name, value in settings.items():
        setattr(model.config, name, value)
    patch(model)
    ours = logits_of(model)
    left = report(model).left
    unpatch(model)
    torch.testing.assert_close(ours, logits_of(model), rtol=1e-4, atol=1e-5)
    assert not left or not set(left.values()) & {"not patched"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_class_that_somebody_changed(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, old = tiny(), Router.forward
    if when == "after":
        patch(model)
    monkeypatch.setattr(Router, "forward", lambda self, hidden: old(self, -hidden))
    classes._agrees.clear()
    patch(model)
    ours = logits_of(model)
    unpatch(model)
    assert ours.equal(logits_of(model))
    classes._agrees.clear()


def test_strided_hidden_states_and_weights() -> None:
    model, embeds = tiny(), torch.randn(1, 64, 8).transpose(1, 2)
    expected = logits_of(model, inputs_embeds=embeds)
    patch(model)
    torch.testing.assert_close(logits_of(model, inputs_embeds=embeds), expected, rtol=1e-4, atol=1e-5)
    router = router_of(model)
    router.load_state_dict({"weight": router.weight.detach().t().contiguous().t()}, assign=True)
    torch.testing.assert_close(logits_of(model, inputs_embeds=embeds), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gemma4_text", "afmoe", "hunyuan_v1_moe", "ernie4_5_moe"])
def test_offload_of_a_module_inside_of_a_router(model_type: str) -> None:
    model = tiny(model_type)
    expected = logits_of(model)
    patch(model)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_a_forward_on_meta() -> None:
    model = tiny()
    patch(model)
    assert model.bfloat16().to("meta")(IDS.to("meta")).logits.is_meta


def test_unpatch_of_a_parametrized_router() -> None:
    model = tiny()
    patch(model)
    parametrize.register_parametrization(router_of(model), "weight", nn.Identity())
    expected = logits_of(model)
    unpatch(model)
    torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)


def test_subclasses_and_strangers_under_enable() -> None:
    """A class by another name stays, and a subclass of a generated class is somebody's own."""
    enable()
    with apply_patches():
        made: Any = modeling_qwen3_moe.Qwen3MoeTopKRouter

        class Negated(made):  # type: ignore[misc]
            pass

    assert made is not Router
    config = tiny().config
    negated, plain = Negated(config), Router(config)
    assert classes.STATE not in vars(negated)
    assert isinstance(plain, made)
    assert not isinstance(plain, Negated)
    assert "MyQwen3MoeTopKRouter" not in get_patch_mapping()


def test_a_load_that_failed_leaves_nothing_behind() -> None:
    """Transformers puts the classes back at the end of a load, which an error skips."""
    enable()
    with pytest.raises(RuntimeError, match="a load that failed"), apply_patches():
        raise RuntimeError("a load that failed")
    assert modeling_qwen3_moe.Qwen3MoeTopKRouter is not Router
    disable()
    assert modeling_qwen3_moe.Qwen3MoeTopKRouter is Router


def test_somebody_elses_mapping_stays() -> None:
    class Mine(Router):  # type: ignore[misc]
        pass

    register_patch_mapping({"Qwen3MoeTopKRouter": Mine})
    enable()
    disable()
    assert get_patch_mapping() == {"Qwen3MoeTopKRouter": Mine}
    from transformers.monkey_patching import unregister_patch_mapping

    unregister_patch_mapping(["Qwen3MoeTopKRouter"])


def test_a_part_without_a_config_is_named() -> None:
    found = patch(tiny().model.layers[0])
    assert found.taken == []
    assert "its config makes no such router" in str(found)


def test_moegate_0_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEGATE", "0")
    enable()
    assert not get_patch_mapping()
    assert "MOEGATE=0" in str(patch(tiny()))


def test_training_without_grad_mode_is_the_classes() -> None:
    """Reentrant checkpointing runs a step once without grad mode and once with: both must choose the same experts."""
    model = tiny()
    patch(model)
    router, hidden = router_of(model).train(), torch.randn(6, 64)
    with torch.no_grad():
        ours = router(hidden)
        own = Router.forward(router, hidden)
    assert all(mine.equal(theirs) for mine, theirs in zip(ours, own, strict=True))


def test_a_key_that_is_read_in_each_call() -> None:
    model = tiny("gemma4_text")
    patch(model)
    router_of(model).config.top_k_experts = 2
    with torch.no_grad():
        assert router_of(model)(torch.randn(6, 64))[2].shape == (6, 2)
    assert "a setting of the router was changed" in str(report(model))


def test_pruned_experts() -> None:
    model = tiny()
    patch(model)
    router = router_of(model)
    router.weight = nn.Parameter(router.weight[:8].detach().clone())
    with torch.no_grad():
        assert router(torch.randn(6, 64))[0].shape == (6, 8)
