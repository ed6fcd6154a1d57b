"""The safetensors files of a local checkpoint: which file holds which tensor, and reading tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moegate.lfs import EXPLANATION, POINTER, why_unreadable

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_SHARD = re.compile(r"model-[0-9]+-of-[0-9]+\.safetensors")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_OTHER_FORMATS = {
    ".bin": "PyTorch",
    ".pt": "PyTorch",
    ".pth": "PyTorch",
    ".gguf": "GGUF",
    ".npz": "NumPy",
    ".pdparams": "Paddle",
    ".h5": "Keras",
    ".msgpack": "Flax",
}


def check_path(path: object) -> Path:
    """The path of a checkpoint: a folder, or one safetensors file."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: got {type(path).__name__}; allowed: a str or a path")
    place = Path(path)
    if place.is_dir():
        return place
    if place.is_file():
        if place.suffix == ".safetensors":
            return place
        raise ValueError(f"path: {place} is no folder; allowed: a checkpoint's folder, or one .safetensors file of it")
    hint = f"; download it first: `hf download {path}` prints the folder" if _HUB_ID.fullmatch(str(path)) else ""
    raise ValueError(f"path: no folder {place}{hint}")


def explain_no_config(config_file: Path) -> None:
    """Raises an explanation if a folder without config.json is recognised as something else than a checkpoint."""
    folder = config_file.parent
    if config_file.exists():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"path: {folder} holds a PEFT adapter without its model; allowed: the two merged")
    snapshots = sorted((folder / "snapshots").glob("*/config.json"))
    if snapshots:
        raise ValueError(f"path: {folder} is a hub cache, no checkpoint; allowed: {snapshots[-1].parent}")


def tensor_files(place: Path) -> dict[str, Path]:
    """The safetensors file of each tensor of a checkpoint: of a folder, or of one file."""
    if place.is_file():
        return dict.fromkeys(_names(place), place)
    index = place / _INDEX
    if not index.is_file():
        return _without_index(place)
    weight_map = _weight_map(index)
    files = {entry: place / entry for entry in set(weight_map.values())}
    if _WHOLE not in files and (place / _WHOLE).is_file():
        raise ValueError(
            f"path: {place} holds {_WHOLE}, and {_INDEX} names other files: two checkpoints in one folder; "
            "allowed: one of them, or the path of the .safetensors file"
        )
    return {name: files[entry] for name, entry in weight_map.items()}


def _weight_map(index: Path) -> dict[str, str]:
    """The file name of each tensor, from the index; files outside of the index's folder are refused."""
    text = ""
    try:
        text = index.read_text(encoding="utf-8")
        weight_map = json.loads(text, object_pairs_hook=_without_repeats)["weight_map"]
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"path: {index} is no index of a sharded checkpoint: {_why(text, error)}") from None
    if not isinstance(weight_map, dict) or not all(isinstance(entry, str) for entry in weight_map.values()):
        raise ValueError(f"path: {index} is no index of a sharded checkpoint: its weight_map names no files")
    for entry in set(weight_map.values()):
        if not _stays_inside(entry):
            raise ValueError(f"path: {index} names the file {entry!r}; allowed: files in its own folder")
    return weight_map


def _why(text: str, error: Exception) -> str:
    return EXPLANATION if text.startswith(POINTER) else repr(error)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is in it twice")
    return found


def _stays_inside(entry: str) -> bool:
    """True if an index entry is a path inside of the folder, also on Windows; symbolic links are not followed."""
    as_windows = PureWindowsPath(entry)  # both / and \ are separators
    return bool(as_windows.name) and not as_windows.anchor and ".." not in as_windows.parts and "\0" not in entry


def _without_index(folder: Path) -> dict[str, Path]:
    """The file of each tensor in a folder without an index: model.safetensors, or else its shards, or else all files.

    Other safetensors files may be in the folder: averaged weights, an adapter, the model in its authors' format.
    """
    found = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    chosen = (
        [file for file in found if file.name == _WHOLE]
        or [file for file in found if _SHARD.fullmatch(file.name)]
        or [file for file in found if not file.name.startswith("adapter_")]
    )
    if not chosen:
        raise ValueError(f"path: {folder} holds neither {_INDEX} nor a .safetensors file of a model{_others(folder)}")
    files: dict[str, Path] = {}
    for file in chosen:
        for name in _names(file):
            if name in files:
                raise ValueError(
                    f"path: {name} is in {files[name].name} and in {file.name}, and {folder} has no {_INDEX}; "
                    "allowed: the path of one .safetensors file"
                )
            files[name] = file
    return files


def _others(folder: Path) -> str:
    """For an error: another format or an adapter that the folder holds instead."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _OTHER_FORMATS:
            return f", but {file.name} ({_OTHER_FORMATS[file.suffix]}); convert it to safetensors first"
        if file.name.startswith("adapter_") and file.suffix == ".safetensors":
            return f", but {file.name}; merge the adapter into its model first"
    return ""


def _names(file: Path) -> list[str]:
    return list(_opened(file).keys())


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {file} is not a whole safetensors file: {why_unreadable(file, error)}") from None


def files_of(folder: Path, files: Mapping[str, Path]) -> set[Path]:
    """All files of a checkpoint: those that a reader opens, there or not, and all other files in the folder.

    Other files belong to the checkpoint too: a tokenizer, a licence, another format.
    """
    there = (path for path in folder.rglob("*") if not path.is_dir())
    return {folder / "config.json", folder / _INDEX, *files.values(), *there}


def is_part(file: Path, folder: Path, parts: Iterable[Path]) -> bool:
    """True if a file is one of a checkpoint's under any name, or would be read as a shard once written.

    Args:
        file: A file that may be missing.
        folder: The checkpoint's folder.
        parts: The files of the checkpoint.
    """
    target = Path(os.path.realpath(file))
    names = (file, target)  # both count, since a reader of the folder follows symbolic links
    is_shard = any(name.suffix == ".safetensors" and is_same(name.parent, folder) for name in names)
    return is_shard or any(is_same(target, part) for part in parts)


def is_same(one: Path, other: Path) -> bool:
    """True if two paths lead to the same file or folder, which may be missing."""
    # realpath, since Path.resolve raises a RuntimeError for a link that leads to itself
    return os.path.realpath(one) == os.path.realpath(other) or (one.exists() and other.exists() and one.samefile(other))


class Reader:
    """Reads tensors by name, and opens each file once."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files
        self._opened: dict[Path, Any] = {}

    def read(self, name: str) -> Tensor:
        """The tensor as stored, a view of the mapped file."""
        file = self._files[name]
        try:
            if file not in self._opened:
                if not file.is_file():
                    raise ValueError(f"path: no file {file}, which should hold {name}")
                self._opened[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._opened[file].get_tensor(name)
            return tensor
        except (SafetensorError, OSError) as error:
            raise ValueError(f"path: cannot read {name} from {file}: {why_unreadable(file, error)}") from None
