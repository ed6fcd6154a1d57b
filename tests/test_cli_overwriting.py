"""`moegate route --out` never overwrites a file that the run reads, or another file of the checkpoint's folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from command_line import refused, run
from safetensors.torch import load_file, save_file
from small_checkpoints import GATE, config_of, weight, write_index

SHARDS = ("model-00001-of-00002.safetensors", "sub/other.bin")
OTHERS = ("ema.safetensors", "tokenizer.json", "sub/deeper/consolidated.00.pth")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Layers 1 and 2, in two files of an index, one without the safetensors suffix; other files beside them."""
    made = tmp_path / "ckpt"
    (made / "sub" / "deeper").mkdir(parents=True)
    (made / "config.json").write_text(json.dumps(config_of("qwen3_moe")), encoding="utf-8")
    names = {GATE + "weight": SHARDS[0], GATE.replace("1", "2") + "weight": SHARDS[1]}
    for seed, (name, file) in enumerate(names.items()):
        save_file({name: weight(seed)}, made / file)
    write_index(made, names)
    for name in OTHERS:
        save_file({"x": weight()}, made / name)
    return made


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def route(source: object, layers: str, out: object) -> tuple[object, ...]:
    return ("route", source, "--layer", layers, "--tokens", 2, "--device", "cpu", "--out", out)


def is_refused(source: Path, out: Path, folder: Path) -> None:
    before = contents(folder)
    for layers in ("1", "1-2"):
        line = refused(*route(source, layers, out))
        assert f"--out: {out} is a file of the checkpoint; allowed: another file" in line
        assert contents(folder) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", *SHARDS, *OTHERS])
@pytest.mark.parametrize("way", ["itself", "symlink", "hard link", "relative", "link to the folder"])
def test_files_of_the_checkpoint(way: str, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = folder / name
    if way == "symlink":
        out = folder.parent / "link"
        out.symlink_to(folder / name)
    elif way == "hard link":
        out = folder.parent / "hard"
        os.link(folder / name, out)
    elif way == "relative":
        monkeypatch.chdir(folder / "sub")
        out = Path("..") / name
    elif way == "link to the folder":
        (folder.parent / "same").symlink_to(folder)
        out = folder.parent / "same" / name
    is_refused(folder, out, folder)


def test_the_file_behind_a_link_of_the_checkpoint(folder: Path) -> None:
    """As in the hub's cache, whose snapshots are links."""
    for name in (SHARDS[0], "tokenizer.json"):
        blob = folder.parent / f"blob of {name}"
        (folder / name).rename(blob)
        (folder / name).symlink_to(blob)
        before = blob.read_bytes()
        for out in (blob, folder / name):
            is_refused(folder, out, folder)
        assert blob.read_bytes() == before


@pytest.mark.parametrize("layers", ["1", "1-1"])
@pytest.mark.parametrize("name", ["one.safetensors", "config.json", "new.safetensors"])
def test_a_checkpoint_of_one_file(name: str, layers: str, folder: Path) -> None:
    (folder / SHARDS[0]).rename(folder / "one.safetensors")
    before = contents(folder)
    line = refused(*route(folder / "one.safetensors", layers, folder / name))
    assert "is a file of the checkpoint" in line
    assert contents(folder) == before


def test_a_new_file_that_would_be_a_shard(folder: Path) -> None:
    (folder.parent / "link").symlink_to(folder / "new.safetensors")
    (folder / "link.safetensors").symlink_to(folder.parent / "elsewhere")
    for out in (folder / "new.safetensors", folder.parent / "link", folder / "link.safetensors"):
        is_refused(folder, out, folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "ema.safetensors").unlink()
    assert "is a file of the checkpoint" in refused(*route(folder, "1", folder / "model.safetensors.index.json"))


def test_new_files_are_written(folder: Path) -> None:
    """A second run is refused: outputs of an earlier run look like other files of the folder."""
    before = contents(folder)
    for out in (folder / "routing", folder / "sub" / "new.safetensors"):
        assert run(*route(folder, "1", out)).exit_code == 0
        assert load_file(out)["topk_ids"].shape == (2, 4)
        is_refused(folder, out, folder)
    assert {file: contents(folder)[file] for file in before} == before


def test_files_elsewhere_are_replaced(folder: Path) -> None:
    """Also in a folder whose name begins like the checkpoint's."""
    before = contents(folder)
    (folder.parent / "ckpt2").mkdir()
    for out in (folder.parent / "new.safetensors", folder.parent / "ckpt2" / "tokenizer.json"):
        for layers in ("1", "1-2", "1"):
            assert run(*route(folder, layers, out)).exit_code == 0
        assert load_file(out)["topk_ids"].shape == (2, 4)
    assert contents(folder) == before


@pytest.mark.parametrize("with_hidden", [False, True])
def test_a_link_that_leads_to_itself(with_hidden: bool, folder: Path) -> None:
    loop, hidden = folder.parent / "loop", folder.parent / "hidden"
    loop.symlink_to(loop)
    save_file({"x": weight()}, hidden)
    asked = ("route", folder, "--layer", "1", "--device", "cpu", *(("--hidden", hidden) if with_hidden else ()))
    assert f"--out: {loop} is a symbolic link that leads back to itself" in refused(*asked, "--out", loop)
    assert loop.is_symlink()


def test_a_source_or_hidden_states_behind_such_a_link(folder: Path) -> None:
    loop = folder.parent / "loop"
    loop.symlink_to(loop)
    assert f"no folder {loop}" in refused("route", loop, "--layer", "1")
    asked = ("route", folder, "--layer", "1", "--device", "cpu", "--out", folder.parent / "out")
    assert f"--hidden: no file {loop}" in refused(*asked, "--hidden", loop)


def test_a_home_of_nobody() -> None:
    assert "no folder ~nobody-of-this-name/ckpt" in refused("route", "~nobody-of-this-name/ckpt", "--layer", "1")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "new.safetensors"])
def test_tune_writes_over_no_source(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moegate.cli.tune.need_gpu", lambda command: None)
    before = contents(folder)
    line = refused("tune", "mixtral-8x7b", folder, "--out", folder / name)
    assert f"--out: {folder / name} is a file of the checkpoint {folder}; allowed: another file" in line
    assert contents(folder) == before
