"""Broken checkpoints: each breach is a ValueError that names the file or the tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoints import refused
from tiny_models import tiny_model
from torch import Tensor

from moegate import Gate

WEIGHT = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
INDEX = "model.safetensors.index.json"
Break = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_model("deepseek_v3", num_hidden_layers=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model("deepseek_v3", num_hidden_layers=4).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "checkpoint")


@pytest.fixture
def sharded(saved_in_shards: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved_in_shards, tmp_path / "sharded")


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    return folder / str(index["weight_map"][tensor])


def change_config(folder: Path, **values: Any) -> None:
    """Sets values in config.json; None removes the key."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_whole(checkpoint: Path, sharded: Path) -> None:
    """The checkpoint that the tests below break is read without an error while it is whole."""
    assert Gate.from_checkpoint(checkpoint, 1).weight.equal(load_file(checkpoint / "model.safetensors")[WEIGHT])
    assert Gate.from_checkpoint(sharded, 1).weight.equal(load_file(shard_of(sharded, WEIGHT))[WEIGHT])


BROKEN_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "shorter than its first number": lambda content: content[:5],
    "truncated in the header": lambda content: content[:100],
    "truncated in the data": lambda content: content[: len(content) // 2],
    "header longer than the file": lambda content: (2**40).to_bytes(8, "little") + content[8:],
    "header is no JSON": lambda content: content[:8] + b"?" + content[9:],
    "random bytes": lambda content: bytes(range(256)) * 8,
}


@pytest.mark.parametrize("broken", BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_broken_file(checkpoint: Path, sharded: Path, broken: Callable[[bytes], bytes]) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(broken(file.read_bytes()))
    refused(checkpoint, str(file))
    shard = shard_of(sharded, WEIGHT)
    shard.write_bytes(broken(shard.read_bytes()))
    refused(sharded, str(shard), WEIGHT)


def test_missing_shard(sharded: Path) -> None:
    shard = shard_of(sharded, WEIGHT)
    shard.unlink()
    refused(sharded, str(shard), WEIGHT)


def test_shard_without_the_tensor(sharded: Path) -> None:
    shard = shard_of(sharded, WEIGHT)
    save_file({"another": torch.zeros(1)}, shard)
    refused(sharded, str(shard), WEIGHT)


def test_only_shards_of_the_gate_are_read(sharded: Path) -> None:
    needed = {shard_of(sharded, WEIGHT), shard_of(sharded, BIAS)}
    for shard in sharded.glob("*.safetensors"):
        if shard not in needed:
            shard.unlink()
    assert Gate.from_checkpoint(sharded, 1).spec.num_experts == 16


def test_no_index_but_shards(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert Gate.from_checkpoint(sharded, 1).spec.num_experts == 16


def test_neither_index_nor_files(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    refused(checkpoint, str(checkpoint), INDEX, ".safetensors")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": null}']
)
def test_broken_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content, encoding="utf-8")
    refused(sharded, str(sharded / INDEX))


def test_index_that_is_no_text(sharded: Path) -> None:
    (sharded / INDEX).write_bytes(b"\xff\xfe{}")
    refused(sharded, str(sharded / INDEX))


CONFIGS: dict[str, tuple[Break, str]] = {
    "missing": (lambda path: path.unlink(), "no file"),
    "a folder": (lambda path: path.rename(path.with_suffix("")).with_suffix(".json").mkdir(), "Is a directory"),
    "empty": (lambda path: path.write_text(""), "not JSON"),
    "no JSON": (lambda path: path.write_text("{'model_type': 'mixtral'}"), "not JSON"),
    "no text": (lambda path: path.write_bytes(b"\xff\xfe"), "not UTF-8"),
    "a list": (lambda path: path.write_text("[]"), "list"),
    "no model_type": (lambda path: change_config(path.parent, model_type=None, architectures=None), "model_type"),
    "model_type of no model": (
        lambda path: change_config(path.parent, model_type="deepseek_v5", architectures=None),
        "deepseek_v5",
    ),
    "model_type no string": (
        lambda path: change_config(path.parent, model_type=["mixtral"], architectures=None),
        "mixtral",
    ),
    "a field of the wrong type": (lambda path: change_config(path.parent, hidden_size="64"), "hidden_size"),
    "k above the experts": (lambda path: change_config(path.parent, num_experts_per_tok=17), "top_k"),
    "groups that do not divide": (lambda path: change_config(path.parent, n_group=5), "n_group"),
    "a field missing": (
        lambda path: change_config(path.parent, model_type="dots1", num_experts_per_tok=None),
        "no num_experts_per_tok",
    ),
}


@pytest.mark.parametrize(("broken", "word"), CONFIGS.values(), ids=CONFIGS)
def test_broken_config(checkpoint: Path, broken: Break, word: str) -> None:
    broken(checkpoint / "config.json")
    refused(checkpoint, str(checkpoint / "config.json"), word)


def test_no_folder(tmp_path: Path, checkpoint: Path) -> None:
    refused(tmp_path / "nowhere", str(tmp_path / "nowhere"))
    refused(checkpoint / "config.json", str(checkpoint / "config.json"))


SHAPES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "an expert less": (WEIGHT, lambda weight: weight[1:]),
    "another hidden size": (WEIGHT, lambda weight: weight[:, 1:]),
    "transposed": (WEIGHT, lambda weight: weight.T),
    "flat": (WEIGHT, lambda weight: weight.flatten()),
    "a number": (WEIGHT, lambda weight: weight.sum()),
    "one bias too many": (BIAS, lambda bias: torch.cat([bias, bias[:1]])),
    "no bias in it": (BIAS, lambda bias: bias[:0]),
}


@pytest.mark.parametrize(("name", "change"), SHAPES.values(), ids=SHAPES)
def test_wrong_shape(checkpoint: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))
    refused(checkpoint, name, "shape")


@pytest.mark.parametrize("name", [WEIGHT, BIAS])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float64], ids=str)
def test_wrong_dtype(checkpoint: Path, name: str, dtype: torch.dtype) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(checkpoint, name, str(dtype))


def test_missing_bias(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.pop(BIAS))
    refused(checkpoint, BIAS.removeprefix("model."), "layer 1")
    assert Gate.from_checkpoint(checkpoint, 2).spec.num_experts == 16


def test_two_tensors_of_one_name(checkpoint: Path) -> None:
    change_tensors(checkpoint, lambda tensors: tensors.update({"ema." + WEIGHT: tensors[WEIGHT].clone()}))
    refused(checkpoint, WEIGHT, "ema." + WEIGHT, "tensors=")


@pytest.mark.parametrize("part", ["mtp.", "model.mtp.", "talker.model."])
def test_parts_that_count_from_zero_again(checkpoint: Path, part: str) -> None:
    """Layers of multi-token-prediction heads and of a speech model are not the model's."""
    expected = Gate.from_checkpoint(checkpoint, 1).weight
    inner = WEIGHT.removeprefix("model.")
    other = {part + inner: torch.zeros_like(expected), part + inner.replace("1", "7"): torch.zeros_like(expected)}
    change_tensors(checkpoint, lambda tensors: tensors.update(other))
    assert Gate.from_checkpoint(checkpoint, 1).weight.equal(expected)
    assert "layers with a router: 1-3" in refused(checkpoint, "layer = 7", layer=7)


def test_a_config_without_dtype(tmp_path: Path) -> None:
    """gpt-oss's config states none: the stored weight's dtype decides whether the logits are rounded."""
    for dtype, logits_dtype in ((torch.bfloat16, "bfloat16"), (torch.float32, "float32")):
        folder = tmp_path / logits_dtype
        tiny_model("gpt_oss").to(dtype).save_pretrained(folder)
        change_config(folder, dtype=None)
        assert Gate.from_checkpoint(folder, 0).spec.logits_dtype == logits_dtype


def test_layer_without_router(checkpoint: Path) -> None:
    assert "layers with a router: 1-3" in refused(checkpoint, "layer = 0", layer=0)
    assert "layers with a router: 1-3" in refused(checkpoint, "layer = 4", layer=4)
    change_tensors(checkpoint, lambda tensors: tensors.pop(WEIGHT.replace("1", "2")))
    assert re.search(r"layers with a router: 1, 3\b", refused(checkpoint, "layer = 2", layer=2))


def test_no_router_at_all(checkpoint: Path) -> None:
    change_config(checkpoint, model_type="qwen3_moe")
    change_tensors(checkpoint, lambda tensors: [tensors.pop(WEIGHT.replace("1", str(layer))) for layer in (1, 2, 3)])
    refused(checkpoint, "no layer has a mlp.gate.weight", str(checkpoint))


def test_negative_layer(checkpoint: Path) -> None:
    refused(checkpoint, "layer = -1", "0 or more", layer=-1)
