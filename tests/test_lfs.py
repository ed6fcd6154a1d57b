"""Files that a clone without git-lfs leaves as pointers."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import refused
from small_checkpoints import GATE, weight, write, write_index

from moegate import Gate, RouterSpec

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 4976698672\n"
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, {GATE + "weight": weight()})
    return tmp_path


def is_hinted(message: str, file: Path) -> None:
    assert str(file) in message
    assert "git-lfs pointer" in message
    assert "`git lfs pull`" in message


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["model.safetensors", SHARD, INDEX, "config.json"])
def test_pointers_of_a_checkpoint(name: str, end: str, folder: Path) -> None:
    if name in (SHARD, INDEX):
        (folder / "model.safetensors").rename(folder / SHARD)
        write_index(folder, {GATE + "weight": SHARD})
    (folder / name).write_bytes(POINTER.replace("\n", end).encode())
    with pytest.raises(ValueError, match=r"^(path|config): ") as caught:
        Gate.from_checkpoint(folder, 1)
    is_hinted(str(caught.value), folder / name)
    is_hinted(refused("route", folder, "--layer", "1"), folder / name)


def test_pointers_that_are_the_path_or_lack_an_index(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_text(POINTER)
    is_hinted(refused("route", file, "--layer", "1"), file)
    file.rename(folder / SHARD)
    is_hinted(refused("route", folder, "--layer", "1"), folder / SHARD)


def test_pointers_of_hidden_states_and_of_a_config_alone(folder: Path) -> None:
    hidden = folder / "hidden"
    hidden.write_text(POINTER)
    is_hinted(refused("route", folder, "--layer", "1", "--device", "cpu", "--hidden", hidden), hidden)
    (folder / "config.json").write_text(POINTER)
    is_hinted(refused("explain", folder, "--device", "sm_90"), folder / "config.json")
    with pytest.raises(ValueError, match="git lfs pull"):
        RouterSpec.from_config(folder)


def test_other_broken_files_are_no_pointers(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version 1")
    assert "lfs" not in refused("route", folder, "--layer", "1")
    (folder / "config.json").write_text("version 1")
    assert "lfs" not in refused("route", folder, "--layer", "1")
