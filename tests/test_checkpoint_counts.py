"""The layers of `all`: those with a router, up to the number of layers in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from command_line import refused
from small_checkpoints import weight, write

from moegate import Gate


def checkpoint(folder: Path, layers: tuple[int, ...], **config: Any) -> Path:
    return write(folder, {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in layers}, **config)


@pytest.mark.parametrize(
    ("layers", "count", "words"),
    [
        ((1, 2, 3, 4), 1, "config.json counts 1 layer; the layers with a router, 1-4, are past it"),
        ((2, 4), 2, "config.json counts 2 layers; the layers with a router, 2, 4, are past it"),
        ((3,), 0, "config.json counts 0 layers; layer 3, with a router, is past it"),
    ],
)
@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layers", "num_layers"])
def test_every_layer_is_past_the_count(
    key: str, layers: tuple[int, ...], count: int, words: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path, layers, **{key: count})
    with pytest.raises(ValueError, match=r"^path: ") as caught:
        Gate.all_from_checkpoint(tmp_path)
    assert words in str(caught.value)
    line = refused("route", tmp_path, "--layer", "all")
    assert line.startswith(f"moegate: --layer: {words}")
    assert list(Gate.all_from_checkpoint(tmp_path, layers=layers)) == list(layers)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layers"])
@pytest.mark.parametrize("count", ["2", "two", 2.0, 2.5, True, [2], {"text": 2}, -1])
def test_a_count_that_is_none(count: object, key: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, (0, 1, 2), **{key: count})
    words = f"config.json: {key} = {count!r}; allowed: an int, 0 or more"
    with pytest.raises(ValueError, match=r"^path: ") as caught:
        Gate.all_from_checkpoint(tmp_path)
    assert words in str(caught.value)
    assert words in refused("route", tmp_path, "--layer", "all")
    assert Gate.from_checkpoint(tmp_path, 2).weight.equal(weight(2))  # a single layer needs no number of layers


def test_the_first_key_that_says_something(tmp_path: Path) -> None:
    checkpoint(tmp_path, (0, 1, 2), n_layers=2, num_layers="not asked")
    assert list(Gate.all_from_checkpoint(tmp_path)) == [0, 1]


def test_no_count(tmp_path: Path) -> None:
    checkpoint(tmp_path, (0, 7))
    assert list(Gate.all_from_checkpoint(tmp_path)) == [0, 7]
