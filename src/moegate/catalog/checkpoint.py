"""Reads a gate from a local Hugging Face checkpoint: config.json and safetensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moegate.arguments import FLOATS, INTEGERS
from moegate.catalog.model_types import ModelType
from moegate.catalog.parts import routing_config
from moegate.spec import RouterSpec

_INDEX = "model.safetensors.index.json"
# Parts of a checkpoint that count their layers from 0 again: heads that predict further tokens, a speaking model.
_BESIDE_THE_MODEL = ("mtp", "talker")


def read_gate(path: str | os.PathLike[str], layer: int) -> tuple[RouterSpec, dict[str, Tensor]]:
    """The spec and the tensors of a layer's gate, by their names in `Gate`. See `Gate.from_checkpoint`."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"path: no folder {folder}")
    if layer < 0:
        raise ValueError(f"layer = {layer}; allowed: 0 or more")
    config_file = folder / "config.json"
    with _naming(config_file):
        config, model_type = routing_config(folder)
    files = tensor_files(folder)
    _check_layer(folder, layer, model_type, files)
    weight, name = _stored(files, model_type, "weight", layer)
    config.setdefault("dtype", str(weight.dtype).removeprefix("torch."))
    with _naming(config_file):
        spec = RouterSpec.from_config(config, layer=layer)
    tensors = {"weight": _shaped("weight", weight, name, spec)}
    for role in _wanted(spec):
        tensors[role] = _shaped(role, *_stored(files, model_type, role, layer), spec)
    return spec, tensors


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of what is in the file name it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"path: {file}: {error}") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """The safetensors file of each tensor of a checkpoint."""
    index = folder / _INDEX
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"path: {index} is no index of a sharded checkpoint: {error!r}") from None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ValueError(f"path: {index} is no index of a sharded checkpoint: its weight_map names no files")
        return {name: folder / file for name, file in weight_map.items()}
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"path: {folder} holds neither {_INDEX} nor a .safetensors file")
    return {name: shard for shard in shards for name in _names(shard)}


def layers_with_gate(files: dict[str, Path], model_type: ModelType) -> list[int]:
    """The layers whose gate's weight is in the checkpoint."""
    suffixes = [suffix for suffix, _ in _alternatives(model_type, "weight")]
    layers = {_layer_of(name, model_type, suffix) for suffix in suffixes for name in files}
    return sorted(layer for layer in layers if layer is not None)


def _layer_of(name: str, model_type: ModelType, suffix: str) -> int | None:
    """The layer of the tensor "...layers.L.suffix"; None for any other name."""
    match = re.search(rf"(^|\.){re.escape(model_type.layers)}\.(\d+)\.{re.escape(suffix)}$", name)
    if match is None or any(part in _BESIDE_THE_MODEL for part in name[: match.start()].split(".")):
        return None
    return int(match.group(2))


def _check_layer(folder: Path, layer: int, model_type: ModelType, files: dict[str, Path]) -> None:
    gated = layers_with_gate(files, model_type)
    if layer not in gated:
        names = ", ".join(suffix for suffix, _ in _alternatives(model_type, "weight"))
        allowed = f"layers with a router: {ranges(gated)}" if gated else f"no layer has a {names}"
        raise ValueError(f"layer = {layer}; allowed: {allowed}, in {folder}")


def _wanted(spec: RouterSpec) -> list[str]:
    """The tensors beside the weight that a gate of this spec has."""
    wanted = {
        "bias": spec.linear_bias,
        "e_score_correction_bias": spec.correction_bias is not None,
        "input_scale": spec.input_norm_eps is not None,
        "per_expert_scale": spec.per_expert_scale,
        "global_scale": spec.global_scale,
        "tid2eid": spec.hash_routing,
    }
    return [role for role, is_wanted in wanted.items() if is_wanted]


def _alternatives(model_type: ModelType, role: str) -> list[tuple[str, str | None]]:
    """The names that a tensor may have behind "layers.L.", each with how to take it."""
    entries: list[Any] = model_type.tensors.get(role, [])
    return [(entry, None) if isinstance(entry, str) else (entry["name"], entry.get("take")) for entry in entries]


def _stored(files: dict[str, Path], model_type: ModelType, role: str, layer: int) -> tuple[Tensor, str]:
    """A tensor of the layer as the checkpoint holds it, less what `take` says, and its name there."""
    tried = []
    for suffix, take in _alternatives(model_type, role):
        matches = [name for name in files if _layer_of(name, model_type, suffix) == layer]
        if len(matches) > 1:
            raise ValueError(f"path: more than one tensor could be the {role} of layer {layer}: {', '.join(matches)}")
        if matches:
            name = matches[0]
            return _taken(_read(files[name], name), name, take), name
        tried.append(f"{model_type.layers}.{layer}.{suffix}")
    raise ValueError(f"path: no {role} of layer {layer} in the checkpoint; looked for {', '.join(tried) or 'nothing'}")


def _names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: {file} is not a whole safetensors file: {error}") from None


def _read(file: Path, name: str) -> Tensor:
    if not file.is_file():
        raise ValueError(f"path: no file {file}, which should hold {name}")
    try:
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path: cannot read {name} from {file}: {error}") from None


def _taken(tensor: Tensor, name: str, take: str | None) -> Tensor:
    """What a gate takes of a stored tensor."""
    if take is None:
        return tensor
    if tensor.dim() != 2 or len(tensor) == 0:
        raise ValueError(f"path: {name} has shape {list(tensor.shape)}; allowed: two dimensions, neither of them empty")
    return tensor.T if take == "transpose" else tensor[0]


def _shaped(role: str, tensor: Tensor, name: str, spec: RouterSpec) -> Tensor:
    """The tensor in the shape and dtype that `Gate` takes."""
    shape = {
        "weight": (spec.num_gate_rows, spec.hidden_size),
        "bias": (spec.num_gate_rows,),
        "e_score_correction_bias": (spec.num_selectable,),
        "input_scale": (spec.hidden_size,),
        "per_expert_scale": (spec.num_experts,),
        "global_scale": (1,),
        "tid2eid": (tensor.shape[0] if tensor.dim() else 0, spec.top_k),
    }[role]
    if [size for size in tensor.shape if size != 1] != [size for size in shape if size != 1]:
        raise ValueError(f"path: {name} has shape {list(tensor.shape)}; allowed by config.json: {list(shape)}")
    dtypes = INTEGERS if role == "tid2eid" else FLOATS
    if tensor.dtype not in dtypes:
        raise ValueError(f"path: {name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if role == "e_score_correction_bias" or (role == "weight" and spec.weight_dtype == "float32"):
        tensor = tensor.to(torch.float32)
    return tensor.reshape(shape).contiguous()


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
