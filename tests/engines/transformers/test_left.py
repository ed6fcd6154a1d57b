"""What stays Transformers' own, for a call or for good, and that the user hears of the reason."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers.models.qwen3_moe import modeling_qwen3_moe
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moegate.integrations import engines
from moegate.integrations.transformers import enable, patch, report, taken

IDS = torch.arange(2, 18).view(2, 8)


@pytest.fixture
def model() -> Any:
    return tiny_models.tiny_model("qwen3_moe").eval()


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    taken._say.cache_clear()
    caplog.set_level(logging.INFO, logger="moegate")
    return caplog


def router_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if isinstance(module, Qwen3MoeTopKRouter))


def hidden_of(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def own(router: nn.Module, hidden: Tensor) -> tuple[Tensor, ...]:
    return type(router).__mro__[1].forward(router, hidden)  # type: ignore[no-any-return, attr-defined]


def hold_left(router: nn.Module, hidden: Tensor, said: pytest.LogCaptureFixture, reason: str) -> None:
    """The class's own result, bit for bit, and one line in the log for two calls."""
    for _ in range(2):
        for mine, theirs in zip(router(hidden), own(router, hidden), strict=True):
            assert mine.equal(theirs)
    lines = [record.getMessage() for record in said.records if "own forward runs" in record.getMessage()]
    assert len(lines) == 1
    assert reason in lines[0]


def test_a_wanted_gradient(model: Any, said: pytest.LogCaptureFixture) -> None:
    patch(model)
    router, hidden = router_of(model), hidden_of()
    hold_left(router, hidden, said, "a gradient is wanted")
    router(hidden)[1].sum().backward()
    assert router.weight.grad.abs().sum() > 0
    router.requires_grad_(False)
    hidden.requires_grad_()
    router(hidden)[1].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.abs().sum() > 0


@torch.no_grad()
def test_autocast(model: Any, said: pytest.LogCaptureFixture) -> None:
    patch(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert router_of(model)(hidden_of())[0].dtype == torch.bfloat16
        hold_left(router_of(model), hidden_of(), said, "autocast is on")


@torch.no_grad()
def test_a_changed_setting(model: Any, said: pytest.LogCaptureFixture) -> None:
    patch(model)
    router = router_of(model)
    router.top_k = 2
    assert router(hidden_of())[2].shape == (6, 2)
    hold_left(router, hidden_of(), said, "a setting of the router was changed")


@torch.no_grad()
def test_half_precision(model: Any, said: pytest.LogCaptureFixture) -> None:
    """moegate rounds logits to bfloat16 or not at all."""
    patch(model)
    assert len(report(model).taken) == 2
    model.half()
    hold_left(router_of(model), hidden_of(torch.float16), said, "it rounds its logits to float16")
    assert set(report(model).left.values()) == {"it rounds its logits to float16"}
    assert len(report(model.bfloat16()).taken) == 2
    assert patch(tiny_models.tiny_model("qwen3_moe").half()).taken == []
    assert len(patch(tiny_models.tiny_model("deepseek_v3").half()).taken) == 1  # logits in float32, whatever the weight


@torch.no_grad()
def test_a_quantised_weight(model: Any, said: pytest.LogCaptureFixture) -> None:
    """A wrapper, whose values no kernel could read: PyTorch's operations know what to do with it."""
    patch(model)
    router = router_of(model)
    weight = router.weight.detach()
    router.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    hold_left(router, hidden_of(), said, "its weight is a TwoTensor")


@torch.no_grad()
def test_new_weights_take_effect_at_once(model: Any) -> None:
    """Assigned, loaded, or written in place, also in ways that PyTorch does not count."""
    patch(model)
    router, hidden = router_of(model), hidden_of()
    before = router(hidden)[0]
    router.weight.data.neg_()
    assert router(hidden)[0].equal(-before)
    router.weight = nn.Parameter(-router.weight)
    assert router(hidden)[0].equal(before)
    router.load_state_dict({"weight": -router.weight})
    assert router(hidden)[0].equal(-before)
    model.to(torch.bfloat16)
    assert router(hidden.bfloat16())[0].dtype == torch.bfloat16


@torch.no_grad()
def test_logits_in_float32_are_a_choice(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """MOEGATE_LOGITS=float32: experts by float32 logits, and the logits that are returned are the class's still."""
    model.to(torch.bfloat16)
    hidden = torch.ones(1, 64, dtype=torch.bfloat16)
    weight = router_of(model).weight
    weight.zero_()
    weight[:, 0] = 1.0
    weight[5, 1] = weight[9, 1] = 2**-10  # 1 + 2**-10 is no bfloat16: the logits of the class tie
    weight[9, 2] = 2**-10
    monkeypatch.setenv("MOEGATE_LOGITS", "float32")
    patch(model)
    logits, _, ids = router_of(model)(hidden)
    assert logits.dtype == torch.bfloat16
    assert logits.eq(1).all()
    assert ids[0, :2].tolist() == [9, 5]


def test_who_is_left_and_why(model: Any) -> None:
    """One line for each reason, in the report and in what `patch` returns."""

    class Qwen3MoeTopKRouter(modeling_qwen3_moe.Qwen3MoeTopKRouter):  # type: ignore[misc]
        pass

    class RemoteTopKRouter(nn.Module):
        pass

    layers = model.model.layers
    layers[0].mlp.gate.__class__ = Qwen3MoeTopKRouter
    layers[1].mlp.gate.top_k = 3
    layers.append(RemoteTopKRouter())
    found = patch(model)
    assert found.taken == []
    assert found.left == {
        "model.layers.0.mlp.gate": "its class Qwen3MoeTopKRouter is not Transformers' own",
        "model.layers.1.mlp.gate": "its top_k is not what its config says",
        "model.layers.2": "no router class of the catalog: RemoteTopKRouter",
    }
    assert str(report(model)).startswith("moegate routes 0 of 3 MoE layers; 3 left: its class")


def test_a_replaced_forward(model: Any) -> None:
    router = router_of(model)
    router.forward = lambda hidden: own(router, hidden)
    assert report(model).left["model.layers.0.mlp.gate"] == "its forward was replaced"
    assert len(patch(model).taken) == 1


def test_a_family_that_is_left() -> None:
    found = patch(tiny_models.tiny_model("dbrx"))
    assert len(found.left) == 2
    assert "selects" in str(found)


def test_another_version_of_transformers(
    model: Any, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    """moegate stands aside, and says so."""
    monkeypatch.setattr(engines, "version", lambda name: "9.1.0")
    enable()
    assert "moegate stands aside: Transformers 9.1.0 is outside of the range" in said.text
    from transformers.monkey_patching import get_patch_mapping

    assert not get_patch_mapping()
    found = patch(model)
    assert found.taken == []
    assert "outside of the range" in str(found)
