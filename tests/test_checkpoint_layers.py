"""Gates of many layers in one pass."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_checkpoints import EXPERTS, bias, config_of, weight, write, write_index
from torch import Tensor

from moegate import Gate


def test_all_are_what_each_is(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{layer}.mlp.gate.{name}": made(layer)
        for layer in (1, 2, 4)
        for name, made in (("weight", weight), ("e_score_correction_bias", bias))
    }
    write(tmp_path, tensors | {"model.layers.0.mlp.up_proj.weight": torch.ones(1)}, "deepseek_v3")
    gates = Gate.all_from_checkpoint(tmp_path)
    assert list(gates) == [1, 2, 4]
    for layer, gate in gates.items():
        alone = Gate.from_checkpoint(tmp_path, layer)
        assert gate.weight.equal(weight(layer))
        assert alone.weight.equal(weight(layer))
        assert gate.get_buffer("e_score_correction_bias").equal(bias(layer))
        assert gate.spec == alone.spec


def test_some(tmp_path: Path) -> None:
    write(tmp_path, {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in range(4)})
    assert list(Gate.all_from_checkpoint(tmp_path, [3, 1, 3])) == [1, 3]
    assert Gate.all_from_checkpoint(tmp_path, ()) == {}
    with pytest.raises(ValueError, match=r"layer = 7; allowed: layers with a router: 0-3"):
        Gate.all_from_checkpoint(tmp_path, (2, 7))
    with pytest.raises(TypeError, match="layer: got bool"):
        Gate.all_from_checkpoint(tmp_path, [True])


def test_none(tmp_path: Path) -> None:
    write(tmp_path, {"model.layers.0.mlp.up_proj.weight": weight()})
    with pytest.raises(ValueError, match=r"no layer has a mlp\.gate\.weight"):
        Gate.all_from_checkpoint(tmp_path)


def test_heads_that_predict_further_tokens_are_asked_for_by_number(tmp_path: Path) -> None:
    """DeepSeek-V3's multi-token-prediction head is layer 61 of a model with 61 layers."""
    tensors = {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in range(3)}
    write(tmp_path, tensors, num_hidden_layers=2)
    assert list(Gate.all_from_checkpoint(tmp_path)) == [0, 1]
    assert Gate.from_checkpoint(tmp_path, 2).weight.equal(weight(2))


def test_options_and_names_of_all(tmp_path: Path) -> None:
    write(tmp_path, {f"model.layers.{layer}.x.w": weight(layer) for layer in range(3)})
    gates = Gate.all_from_checkpoint(
        tmp_path,
        spec=lambda found: replace(found, top_k=2),
        tensors={"weight": "model.layers.{layer}.x.w"},
        frozen=False,
    )
    assert {layer: (gate.spec.top_k, gate.frozen) for layer, gate in gates.items()} == dict.fromkeys(
        range(3), (2, False)
    )
    assert all(gate.weight.equal(weight(layer)) for layer, gate in gates.items())
    with pytest.raises(ValueError, match=r"for several layers; allowed: \{layer\}"):
        Gate.all_from_checkpoint(tmp_path, (0, 1), tensors={"weight": "model.layers.0.x.w"})


def test_names_that_only_some_layers_take(tmp_path: Path) -> None:
    """DeepSeek-V4's first layers have a hash table, and the others a bias."""
    table = torch.arange(EXPERTS).expand(8, EXPERTS)[:, :4].contiguous()
    tensors: dict[str, Tensor] = {"model.layers.0.x.table": table, "model.layers.4.x.bias": bias()}
    tensors |= {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in (0, 4)}
    write(tmp_path, tensors, "deepseek_v4")
    named = {"tid2eid": "x.table", "e_score_correction_bias": "model.layers.{layer}.x.bias"}
    gates = Gate.all_from_checkpoint(tmp_path, tensors=named)
    assert gates[0].get_buffer("tid2eid").equal(table)
    assert gates[4].get_buffer("e_score_correction_bias").equal(bias())


LAYERS, DENSE, ROUTED = 61, 3, 256
PARTS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with as many names as DeepSeek-V3's index; one file a layer, which holds a small gate only."""
    folder = tmp_path_factory.mktemp("large")
    weight_map: dict[str, str] = {}
    for layer in range(LAYERS):
        start, file = f"model.layers.{layer}.", f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        experts = range(ROUTED if layer >= DENSE else 0)
        names = [f"mlp.experts.{expert}.{part}.weight" for expert in experts for part in PARTS]
        weight_map |= {start + name + end: file for name in names for end in ("", "_scale_inv")}
        if layer >= DENSE:
            gate = {"mlp.gate.weight": weight(layer), "mlp.gate.e_score_correction_bias": bias(layer)}
            weight_map |= {start + name: file for name in gate}
            save_file({start + name: tensor for name, tensor in gate.items()}, folder / file)
    assert len(weight_map) > 89_000
    write_index(folder, weight_map)
    config = config_of("deepseek_v3", num_hidden_layers=LAYERS)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_gates_of_a_large_checkpoint_in_two_seconds(large: Path) -> None:
    Gate.from_checkpoint(large, DENSE)  # loads the catalog and the backend
    gc.collect()
    start = time.process_time()  # of this process, without other load on the machine
    gates = Gate.all_from_checkpoint(large)
    seconds = time.process_time() - start
    assert list(gates) == list(range(DENSE, LAYERS))
    assert all(gate.weight.equal(weight(layer)) for layer, gate in gates.items())
    assert seconds < 2


def test_each_file_is_opened_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(file: Path, **options: Any) -> Any:
        opened.append(file)
        return safe_open(file, **options)

    monkeypatch.setattr("moegate.catalog.files.safe_open", counted)
    Gate.all_from_checkpoint(large)
    assert len(opened) == len(set(opened)) == LAYERS - DENSE
    opened.clear()
    Gate.from_checkpoint(large, 30)
    assert [file.name for file in opened] == ["model-00031-of-00061.safetensors"]
