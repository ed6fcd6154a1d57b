"""What `moegate route` routes: a gate and the hidden states for it, from a name, a folder or a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moegate import catalog
from moegate.catalog.checkpoint import layers_with_gate, ranges, tensor_files
from moegate.catalog.parts import routing_config
from moegate.catalog.synthetic import random_gate, random_hidden, random_input_ids
from moegate.gate import Gate
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec

DEFAULT_TOKENS = 64


@dataclass(frozen=True)
class Job:
    """A gate and its inputs."""

    title: str
    """What is routed, for people: "deepseek-v3" or a folder with its layer."""
    gate: Gate
    hidden: Tensor
    input_ids: Tensor | None
    origin: str
    """Where the numbers come from."""

    @property
    def weight(self) -> Tensor:
        """The gate's weight."""
        return self.gate.weight.detach()

    @property
    def tensors(self) -> RouterTensors:
        """The gate's small tensors."""
        return RouterTensors(*(getattr(self.gate, name) for name in RouterTensors._fields))


def load_job(
    source: str, layer: int | None, hidden_file: Path | None, tokens: int | None, seed: int, device: torch.device
) -> Job:
    """The gate of `source` and its inputs, on the device.

    Raises:
        ValueError: An unknown name, a folder or a file that does not hold what it should, or options
            that exclude each other.
    """
    if hidden_file is not None and tokens is not None:
        raise ValueError("--tokens: allowed without --hidden only, which has its own number of tokens")
    folder = _folder(source)
    if folder is None:
        if layer is not None:
            raise ValueError("--layer: allowed with a checkpoint folder only; a named model stands for its layers")
        title, gate = source.lower(), random_gate(_named(source), seed, device)
        origin = f"random weights, seed {seed}"
    else:
        if layer is None:
            raise ValueError(f"--layer: missing; {_layers(folder)}, in {folder}")
        title, gate = f"{folder}, layer {layer}", Gate.from_checkpoint(folder, layer, device=device)
        origin = "weights of the checkpoint"
    spec = gate.spec
    if hidden_file is not None:
        hidden, input_ids = _read_hidden(hidden_file, spec.hash_routing)
        input_ids = None if input_ids is None else input_ids.to(device)
        return Job(title, gate, hidden.to(device), input_ids, f"{origin}; hidden states of {hidden_file}")
    tokens = DEFAULT_TOKENS if tokens is None else tokens
    input_ids = None
    if spec.hash_routing:
        input_ids = random_input_ids(tokens, seed, device, len(gate.get_buffer("tid2eid")))
    hidden = random_hidden(spec, tokens, seed, device)
    origin = f"{origin}; random hidden states" + (f", seed {seed}" if folder is not None else "")
    return Job(title, gate, hidden, input_ids, origin)


def load_spec(source: str) -> tuple[str, RouterSpec]:
    """A title and what the router computes: of a name, or of a folder with a config.json, at most of its layers.

    Raises:
        ValueError: An unknown name, or a folder whose config.json is missing, broken or unknown.
    """
    folder = _folder(source)
    if folder is None:
        return source.lower(), _named(source)
    _check_folder(folder)
    return str(folder), RouterSpec.from_config(folder)


def _folder(source: str) -> Path | None:
    """The source as a checkpoint folder, or the one whose config.json it is; None: a name, or a misspelt one."""
    path = Path(source).expanduser()
    path = path.parent if path.name == "config.json" else path
    is_path = os.sep in source or source.startswith((".", "~"))
    if is_path or (source.lower() not in catalog.names() and path.is_dir()):
        return path
    return None


def _named(source: str) -> RouterSpec:
    try:
        return catalog.get_spec(source)
    except ValueError as error:
        hint = str(error).partition("; ")[2].partition("allowed:")[0]
        raise ValueError(
            f"{source!r} is neither a name of the catalog nor a folder; {hint}`moegate models` lists the names"
        ) from None


def _check_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    name = folder.name.lower()
    hint = f"did you mean {name!r}? Nothing" if name in catalog.names() else "nothing"
    raise ValueError(f"no folder {folder}; {hint} is downloaded; `moegate models` lists the names")


def _layers(folder: Path) -> str:
    _check_folder(folder)
    _, model_type = routing_config(folder)
    layers = layers_with_gate(tensor_files(folder), model_type)
    return f"layers with a router: {ranges(layers)}" if layers else "no layer has a router"


def _read_hidden(file: Path, needs_ids: bool) -> tuple[Tensor, Tensor | None]:
    """The hidden states of a safetensors file, and the token ids if they are needed."""
    if not file.is_file():
        raise ValueError(f"--hidden: no file {file}")
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--hidden: {file} is not a whole safetensors file: {error}") from None
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
    matrices = [tensor for tensor in tensors.values() if tensor.dim() == 2]
    if "hidden" in tensors:
        hidden = tensors["hidden"]
    elif len(matrices) == 1:
        hidden = matrices[0]
    else:
        raise ValueError(f'--hidden: {file} holds {shapes}; allowed: one 2-D tensor, or one named "hidden"')
    if not needs_ids:
        return hidden, None
    if "input_ids" not in tensors:
        raise ValueError(f"--hidden: {file} holds {shapes}; this layer routes by token id and needs input_ids, too")
    return hidden, tensors["input_ids"]
