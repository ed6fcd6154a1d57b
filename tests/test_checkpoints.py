"""Whole models of Transformers, saved and read back: each gate routes as the model's own router did in a forward pass."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from router_cases import ROUNDED_WEIGHTS
from tiny_models import TINY, tiny_model
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers_routers import TransformersRouter, as_routing

from moegate import Gate
from moegate.catalog.checkpoint import layers_with_gate, tensor_files
from moegate.catalog.model_types import model_types
from moegate.contract import bounds, reference
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors

TOKENS = (2, 32)
EXCUSED = 0.01
"""The share of a model's rows whose experts may differ within the contract's margin."""
EXCUSED_ROUNDED = 0.25
"""... with logits in bfloat16: of 16 such logits in -4..4, two neighbours are often the same number, and each `topk`
takes one of them as it likes. A wrong tensor makes nearly all rows differ, and beyond the margin."""

SHARDED = ("deepseek_v3", "deepseek_v4", "ernie4_5_moe", "gemma4_text", "gpt_oss", "mixtral", "qwen3_moe", "step3p5")
BFLOAT16 = ("deepseek_v3", "hy_v3", "glm4_moe", "nemotron_h", "ernie4_5_moe", "mixtral", "afmoe", "minimax")
"""Types whose class computes in bfloat16 what the spec says; the last three round their logits."""


class Seen(NamedTuple):
    """What went through a model's router."""

    module: nn.Module
    hidden: Tensor
    output: Any


def run(model: PreTrainedModel, input_ids: Tensor) -> dict[int, Seen]:
    """What the router of each layer of feed-forward experts for text saw and returned in a forward pass."""
    seen: dict[int, Seen] = {}
    for name, module in model.named_modules():
        is_router = re.search(r"(Router|TopKGating|MoEV1Gate)$", type(module).__name__)
        if is_router and not re.search("self_attention|vision_moe", name):
            layer = re.search(r"(?:layers|blocks)\.(\d+)\.", name)
            assert layer is not None
            watch(module, int(layer.group(1)), seen)
    with torch.no_grad():
        model(input_ids=input_ids)
    return seen


def watch(module: nn.Module, layer: int, seen: dict[int, Seen]) -> None:
    def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        hidden = inputs[0].clone()
        seen[layer] = Seen(module, hidden.reshape(-1, hidden.shape[-1]), output)

    module.register_forward_hook(keep)


def draw_ids(model: PreTrainedModel) -> Tensor:
    return torch.randint(3, model.config.vocab_size, TOKENS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", TINY)
def test_as_in_the_model(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    hold(model, tmp_path, EXCUSED)


@pytest.mark.parametrize("model_type", SHARDED)
def test_sharded(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, seed=1)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) > 4
    hold(model, tmp_path, EXCUSED)


@pytest.mark.parametrize("model_type", BFLOAT16)
def test_bfloat16(model_type: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    model = tiny_model(model_type, seed=2, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    rounds = Gate.from_checkpoint(tmp_path, 1).spec.logits_dtype == "bfloat16"
    assert rounds == (model_type in BFLOAT16[-3:])
    record_property("excused", hold(model, tmp_path, EXCUSED_ROUNDED if rounds else EXCUSED))


def hold(model: PreTrainedModel, folder: Path, excused: float) -> float:
    """Holds every gate of the checkpoint against the model's router; returns the share of rows that differ."""
    input_ids = draw_ids(model)
    seen = run(model, input_ids)
    assert layers_with_gate(tensor_files(folder), model_types()[model.config.model_type]) == sorted(seen)
    differ = [hold_layer(model, folder, layer, seen[layer], input_ids.flatten()) for layer in seen]
    share = sum(differ) / (len(differ) * input_ids.numel())
    assert share <= excused
    return share


def hold_layer(model: PreTrainedModel, folder: Path, layer: int, seen: Seen, input_ids: Tensor) -> int:
    gate = Gate.from_checkpoint(folder, layer)
    token_ids = input_ids if gate.spec.hash_routing else None
    ours = gate.forward(seen.hidden, input_ids=token_ids)

    rounds_weights = model.dtype == torch.bfloat16 and model.config.model_type in ROUNDED_WEIGHTS
    spec = replace(gate.spec, topk_weights_dtype="bfloat16") if rounds_weights else gate.spec
    tensors = RouterTensors(**{name: getattr(gate, name) for name in RouterTensors._fields})
    exact = reference.router_logits(seen.hidden, gate.weight, replace(spec, logits_dtype="float32"), tensors)
    error = bounds.logit_bound(seen.hidden, gate.weight, exact, spec, tensors)
    theirs = as_routing(TransformersRouter(model.config, seen.module, {}).read(seen.output), exact, spec, tensors)
    verdict = verify_routing(theirs, exact, spec, tensors, input_ids=token_ids, logit_error=error)
    assert not verdict.problems
    assert not verify_routing(ours, exact, gate.spec, tensors, input_ids=token_ids, logit_error=error).problems
    same = ours.topk_ids.sort(dim=-1).values.eq(theirs.topk_ids.sort(dim=-1).values).all(dim=-1)
    return int((~same).sum())
