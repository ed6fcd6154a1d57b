"""The files of a folder that count as the checkpoint, and the paths that may be given."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoints import GATE, refused, weight, write, write_index

from moegate import Gate

NAME = GATE + "weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "model", {NAME: weight()})


@pytest.mark.parametrize(
    "other",
    [
        "model_ema.safetensors",
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "ema.safetensors",
        "a.safetensors",
    ],
)
def test_a_whole_model_wins(other: str, folder: Path) -> None:
    """model.safetensors wins over files before and behind it in the alphabet."""
    save_file({NAME: weight(1)}, folder / other)
    assert Gate.from_checkpoint(folder, 1).weight.equal(weight())


@pytest.mark.parametrize("other", ["model_ema-00001-of-00001.safetensors", "consolidated.safetensors"])
def test_shards_win(other: str, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    save_file({NAME: weight(1)}, folder / other)
    assert Gate.from_checkpoint(folder, 1).weight.equal(weight())


@pytest.mark.parametrize("names", [("one", "two"), ("model-00001-of-00002", "model-00001-of-00003")])
def test_one_tensor_in_two_files(names: tuple[str, str], folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    for seed, name in enumerate(names):
        save_file({NAME: weight(seed)}, folder / f"{name}.safetensors")
    refused(folder, f"{NAME} is in {names[0]}.safetensors and in {names[1]}.safetensors")


def test_files_of_any_name_that_share_nothing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "layers-1.safetensors")
    save_file({"model.layers.2.mlp.gate.weight": weight(2)}, folder / "layers-2.safetensors")
    save_file({NAME: weight(3)}, folder / "adapter_model.safetensors")
    assert Gate.from_checkpoint(folder, 1).weight.equal(weight())
    assert Gate.from_checkpoint(folder, 2).weight.equal(weight(2))


def test_a_whole_model_beside_the_index_of_another(folder: Path) -> None:
    """Refused, since Transformers reads one of the two and vLLM the other."""
    save_file({NAME: weight(1)}, folder / "model-00001-of-00001.safetensors")
    write_index(folder, {NAME: "model-00001-of-00001.safetensors"})
    refused(folder, "two checkpoints in one folder")
    assert Gate.from_checkpoint(folder / "model.safetensors", 1).weight.equal(weight())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", ("pytorch_model.bin (PyTorch)", "safetensors")),
        ("model.gguf", ("model.gguf (GGUF)",)),
        ("consolidated.00.pth", ("consolidated.00.pth (PyTorch)",)),
        ("adapter_model.safetensors", ("adapter_model.safetensors", "merge")),
    ],
)
def test_no_model_in_safetensors(name: str, words: tuple[str, ...], folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, f"{folder} holds neither", *words)


@pytest.mark.parametrize("what", ["../model.safetensors", "../../x.safetensors", "sub/../../x.safetensors", "absolute"])
@pytest.mark.parametrize("of", [NAME, "model.layers.0.mlp.up_proj.weight"])
def test_an_index_entry_that_leaves_the_folder(what: str, of: str, folder: Path, tmp_path: Path) -> None:
    """Refused before anything is read, also for a file without a gate."""
    outside = tmp_path / "x.safetensors"
    save_file({NAME: weight(1)}, outside)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    entry = str(outside) if what == "absolute" else what
    write_index(folder, {NAME: "model-00001-of-00001.safetensors", of: entry})
    refused(folder, "model.safetensors.index.json", repr(entry), "its own folder")


@pytest.mark.parametrize("entry", ["..\\x.safetensors", "C:\\x.safetensors", "\\\\host\\x", "", ".", "..", "x\0y"])
def test_an_index_entry_that_would_leave_elsewhere(entry: str, folder: Path) -> None:
    """Refused: paths that leave the folder on Windows, and texts that are no file names."""
    (folder / "model.safetensors").unlink()
    write_index(folder, {NAME: entry})
    refused(folder, "model.safetensors.index.json", "its own folder")


def test_a_folder_within_and_the_links_of_a_hub_cache(folder: Path, tmp_path: Path) -> None:
    """snapshots/abc/model.safetensors is a link to ../../blobs/123 there."""
    blob = tmp_path / "blobs" / "123"
    blob.parent.mkdir()
    (folder / "model.safetensors").rename(blob)
    (folder / "parts").mkdir()
    (folder / "parts" / "1.safetensors").symlink_to("../../blobs/123")
    write_index(folder, {NAME: "parts/1.safetensors"})
    assert Gate.from_checkpoint(folder, 1).weight.equal(weight())


def test_a_name_twice_in_an_index(folder: Path) -> None:
    text = f'{{"weight_map": {{"{NAME}": "a.safetensors", "{NAME}": "b.safetensors"}}}}'
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, f"{NAME!r} is in it twice")


def test_an_index_nested_without_end(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    refused(folder, "is no index of a sharded checkpoint")


def test_an_index_of_absurd_layers(folder: Path) -> None:
    """Numbers too long for Python's int, and digits other than 0 to 9."""
    (folder / "model.safetensors").unlink()
    names = [f"model.layers.{number}.mlp.gate.weight" for number in ("9" * 5000, "²", "٣", "-1", "")]
    write_index(folder, dict.fromkeys(names, "x.safetensors"))
    refused(folder, "no layer has a mlp.gate.weight")


PATHS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "a hub id": (lambda folder: "Qwen/Qwen3-30B-A3B", ("no folder Qwen/Qwen3-30B-A3B", "download it first")),
    "a folder that is not there": (lambda folder: folder / "x", ("no folder",)),
    "a file of another kind": (lambda folder: folder / "config.json", ("is no folder", ".safetensors")),
}


@pytest.mark.parametrize(("make", "words"), PATHS.values(), ids=PATHS)
def test_paths(make: Callable[[Path], object], words: tuple[str, ...], folder: Path) -> None:
    refused(make(folder), *words)


@pytest.mark.parametrize("path", [None, 3, b"x"])
def test_no_paths(path: object) -> None:
    refused(path, "path: got", error=TypeError)


def test_a_hub_cache(folder: Path, tmp_path: Path) -> None:
    """A model's folder in the hub cache is refused; the error names the snapshot in it."""
    snapshot = tmp_path / "models--a--b" / "snapshots" / "123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    refused(tmp_path / "models--a--b", "is a hub cache", str(snapshot))
    assert Gate.from_checkpoint(snapshot, 1).weight.equal(weight())


def test_one_file(folder: Path) -> None:
    """The file is read with the config beside it, and no other file."""
    save_file({NAME: weight(1)}, folder / "model_ema.safetensors")
    (folder / "model.safetensors").write_bytes(b"broken")
    assert Gate.from_checkpoint(folder / "model_ema.safetensors", 1).weight.equal(weight(1))
    assert Gate.from_checkpoint(str(folder / "model_ema.safetensors"), 1).weight.equal(weight(1))


@pytest.mark.parametrize("layer", [True, "1", 1.0, None])
def test_a_layer_that_is_no_int(layer: object, folder: Path) -> None:
    refused(folder, f"layer: got {type(layer).__name__}", error=TypeError, layer=layer)


def test_a_gate_does_not_change_with_the_file(folder: Path) -> None:
    """A gate's tensors are no views of the mapped file."""
    gate = Gate.from_checkpoint(folder, 1)
    file = folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(-weight().nbytes, 2)
        opened.write(bytes(weight().nbytes))
    assert Gate.from_checkpoint(folder, 1).weight.count_nonzero() == 0
    assert gate.weight.equal(weight())


def test_an_index_is_parsed_in_linear_time(folder: Path) -> None:
    """A name of a million characters that nearly matches a layer's pattern everywhere."""
    (folder / "model.safetensors").unlink()
    write_index(
        folder, {"layers." * 150_000 + "x": "x.safetensors", json.dumps("layers.1." * 100_000): "x.safetensors"}
    )
    refused(folder, "no layer has a mlp.gate.weight")


def test_float64_and_integers_are_refused(folder: Path) -> None:
    for dtype in (torch.float64, torch.int8):
        save_file({NAME: torch.ones(16, 64, dtype=dtype)}, folder / "model.safetensors")
        refused(folder, NAME, str(dtype))
