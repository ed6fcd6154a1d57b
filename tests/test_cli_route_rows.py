"""The rows of `moegate route` with several layers: tokens that are NaN, and narrow consoles."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from command_line import run
from safetensors.torch import save_file
from small_checkpoints import EXPERTS, HIDDEN, TOP_K, bias, weight, write

LAYERS = (1, 12, 3)
TOKENS = 7


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in LAYERS}
    return write(tmp_path / "c", tensors)


def hidden_states(folder: Path, nan: tuple[int, ...]) -> Path:
    hidden = torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))
    hidden[list(nan)] = torch.nan
    save_file({"hidden": hidden}, folder / "hidden")
    return folder / "hidden"


def route(checkpoint: Path, *more: object, columns: int = 80) -> tuple[str, str]:
    result = run("route", checkpoint, "--layer", "all", "--device", "cpu", *more, columns=columns)
    assert result.exit_code == 0
    return result.stdout, result.stderr


def rows(shown: str) -> list[dict[str, str]]:
    """The table's rows, each by column name."""
    lines = shown.splitlines()
    head = next(line for line in lines if "contract" in line and "least" in line)
    names = head.replace("of bound", "bound").replace("µs a call", "µs").split()
    cells = [line.split() for line in lines if line[:5].strip().isdigit()]
    return [dict(zip(names, row, strict=True)) for row in cells]


@pytest.mark.parametrize("nan", [(2,), (0, 3), tuple(range(TOKENS))])
def test_nan_hidden_states(nan: tuple[int, ...], checkpoint: Path, tmp_path: Path) -> None:
    shown, said = route(checkpoint, "--hidden", hidden_states(tmp_path, nan))
    for row, layer in zip(rows(shown), sorted(LAYERS), strict=True):
        assert (row["layer"], row["contract"], row["NaN"]) == (f"{layer}", "kept", f"{len(nan)}")
        assert row["mean"] == f"{(TOKENS - len(nan)) * TOP_K / EXPERTS:.1f}"
        assert f"layer {layer}: kept, {len(nan)} of {TOKENS} tokens are NaN" in said.splitlines()
    assert "NaN: tokens whose weights are NaN" in " ".join(shown.split())


def test_a_layer_whose_weight_is_nan(checkpoint: Path) -> None:
    """One layer of several: its row counts all tokens as NaN, the other rows none."""
    tensors = {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in LAYERS}
    tensors["model.layers.3.mlp.gate.weight"].fill_(torch.nan)
    write(checkpoint, tensors)
    shown, said = route(checkpoint, "--tokens", TOKENS)
    assert [row["NaN"] for row in rows(shown)] == ["0", f"{TOKENS}", "0"]
    assert said.splitlines() == [
        "layer 1: kept",
        f"layer 3: kept, {TOKENS} of {TOKENS} tokens are NaN",
        "layer 12: kept",
    ]


def test_no_column_without_nan(checkpoint: Path) -> None:
    shown, said = route(checkpoint)
    assert "NaN" not in shown + said


@pytest.mark.parametrize("columns", [20, 40, 60, 70, 80, 120])
@pytest.mark.parametrize("nan", [(), (2,)])
def test_narrow_consoles(columns: int, nan: tuple[int, ...], checkpoint: Path, tmp_path: Path) -> None:
    """Every number of the JSON is printed in full, on lines that fit the console."""
    asked = ("--hidden", hidden_states(tmp_path, nan))
    shown, _ = route(checkpoint, *asked, columns=columns)
    assert "…" not in shown
    assert max(map(len, shown.splitlines())) <= columns
    words = re.split(r"[\s,:]+", shown)
    for fact in json.loads(route(checkpoint, *asked, "--json")[0]):
        load = fact["load"]["experts"]
        mean, share = f"{sum(load) / len(load):.1f}", f"{fact['logits']['share_of_bound']:.2%}"
        for number in (fact["layer"], min(load), mean, max(load), load.count(0), share):
            assert f"{number}" in words
    assert words.count("kept") == len(LAYERS)
    assert len(re.findall(r"\d+\.\d ?$|\d+\.\d\s+µs", shown, re.MULTILINE)) >= len(LAYERS)  # a time a layer


def test_large_numbers_that_a_table_of_80_columns_has_no_room_for(tmp_path: Path) -> None:
    """Whether the table fits depends on the numbers as well as on the console."""
    made = {"weight": weight, "e_score_correction_bias": bias}
    tensors = {f"model.layers.{layer}.mlp.gate.{name}": make() for layer in (1, 2) for name, make in made.items()}
    folder = write(tmp_path / "c", tensors, "deepseek_v3")
    for columns in (60, 68, 70, 72, 74, 76, 80):
        shown, _ = route(folder, "--tokens", 150, columns=columns)
        assert "…" not in shown
        assert shown.count("kept") == 2
        assert max(map(len, shown.splitlines())) <= columns
