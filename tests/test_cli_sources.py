"""Files of a checkpoint in place of its folder, as sources of the commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import refused, run
from small_checkpoints import GATE, weight, write

from moegate.cli.inputs import load_spec

EXPLAIN = ("explain", "--device", "sm_90", "--json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "ckpt", {GATE + "weight": weight()})


def explained(source: object) -> object:
    result = run(*EXPLAIN, source)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_a_safetensors_file_stands_for_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = explained(folder)
    assert explained(folder / "model.safetensors") == expected
    (folder.parent / "link").symlink_to(folder)
    assert explained(folder.parent / "link" / "model.safetensors") == expected
    assert load_spec(str(folder / "model.safetensors")) == load_spec(str(folder))
    monkeypatch.chdir(folder)
    for name in ("model.safetensors", "./model.safetensors", "config.json"):
        assert explained(name) == expected


def test_route_takes_a_file_by_its_bare_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    asked = ("--layer", 1, "--device", "cpu", "--json", "--tokens", 2)
    found = json.loads(run("route", "model.safetensors", *asked).stdout)
    assert found["source"] == "model.safetensors, layer 1"


def test_a_safetensors_file_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert f"no file {folder / 'config.json'}" in refused("explain", folder / "model.safetensors")


@pytest.mark.parametrize("name", ["model.bin", "tokenizer.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("bare", [False, True])
def test_other_files_are_told_what_is_allowed(
    name: str, bare: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(folder / "config.json", folder / name)
    monkeypatch.chdir(folder)
    source = Path(name) if bare else folder / name
    line = refused("explain", source)
    assert f"{source} is no folder; allowed: a folder with a config.json, that file, or a .safetensors file" in line
    assert f"{source} is no folder; allowed: a checkpoint's folder" in refused("route", source, "--layer", "1")


@pytest.mark.parametrize("command", [("explain",), ("route", "--layer", "1")])
def test_a_file_that_is_not_there(command: tuple[str, ...], folder: Path) -> None:
    missing = folder / "other.safetensors"
    assert f"no file {missing}; nothing is downloaded" in refused(*command, missing)


def test_a_name_of_the_catalog_wins_over_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = explained("mixtral-8x7b")
    Path("mixtral-8x7b").write_text("not asked")
    assert explained("mixtral-8x7b") == expected
