"""Loads what `moegate route` routes: a gate and its hidden states, from a name, a folder or a file."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moegate import catalog
from moegate.catalog.checkpoint import Checkpoint
from moegate.catalog.files import files_of, is_part
from moegate.gate import Gate
from moegate.lfs import why_unreadable
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec
from moegate.synthetic import random_gate, random_hidden, random_input_ids

DEFAULT_TOKENS = 64


@dataclass(frozen=True)
class Job:
    """A gate and its inputs."""

    title: str
    """For users: "deepseek-v3", or a folder with its layer."""
    gate: Gate
    hidden: Tensor
    input_ids: Tensor | None
    origin: str
    """For users: where weights and hidden states come from."""
    layer: int | None = None
    """The layer; None: a named model."""

    @property
    def weight(self) -> Tensor:
        """The gate's weight."""
        return self.gate.weight.detach()

    @property
    def tensors(self) -> RouterTensors:
        """The gate's small tensors."""
        return RouterTensors(*(getattr(self.gate, name) for name in RouterTensors._fields))


@dataclass(frozen=True)
class Inputs:
    """The source of hidden states: a file, or a generator of random numbers."""

    file: Path | None
    tokens: int
    seed: int
    device: torch.device

    @property
    def origin(self) -> str:
        """For users: where the hidden states come from."""
        return "random hidden states" if self.file is None else f"hidden states of {self.file}"

    @cached_property
    def _stored(self) -> dict[str, Tensor]:
        """The tensors of the file, read once for all layers."""
        assert self.file is not None
        if not self.file.is_file():
            raise ValueError(f"--hidden: no file {self.file}")
        try:
            tensors: dict[str, Tensor] = load_file(self.file)
            return tensors
        except (SafetensorError, OSError) as error:
            reason = why_unreadable(self.file, error)
            raise ValueError(f"--hidden: {self.file} is not a whole safetensors file: {reason}") from None

    def of(self, gate: Gate) -> tuple[Tensor, Tensor | None]:
        """The hidden states, and the token ids if the gate needs them."""
        spec = gate.spec
        if self.file is not None:
            hidden, input_ids = _hidden_of(self.file, self._stored, spec.hash_routing)
            return hidden.to(self.device), None if input_ids is None else input_ids.to(self.device)
        input_ids = None
        if spec.hash_routing:
            input_ids = random_input_ids(self.tokens, self.seed, self.device, len(gate.get_buffer("tid2eid")))
        return random_hidden(spec, self.tokens, self.seed, self.device), input_ids


@dataclass(frozen=True)
class Jobs:
    """The jobs of a run of `moegate route`: a named model, or layers of a checkpoint."""

    title: str
    """For users: "deepseek-v3", or a folder."""
    layers: list[int]
    """The layers; empty: a named model."""
    _load: Callable[[], Iterator[Job]]
    _checkpoint: Checkpoint | None = None

    def check_out(self, out: Path) -> None:
        """Refuses an output file that belongs to the checkpoint.

        Raises:
            ValueError: The file is one of the checkpoint's, or would be read as one.
        """
        if self._checkpoint is not None and self._checkpoint.has_part(out):
            raise ValueError(f"--out: {out} is a file of the checkpoint; allowed: another file")

    def __iter__(self) -> Iterator[Job]:
        """The gates with their inputs, loaded one at a time."""
        return self._load()


def load_jobs(source: str, layers: str | None, inputs: Inputs, change: Callable[[RouterSpec], RouterSpec]) -> Jobs:
    """The gates of `source` and their inputs, on the device.

    Args:
        source: A name, or a checkpoint's path.
        layers: The text of --layer.
        inputs: The source of hidden states.
        change: Changes each spec that is found.

    Raises:
        ValueError: Here or while the jobs are loaded: an unknown name, a folder or file with other contents than
            needed, missing layers.
    """
    folder = _folder(source)
    if folder is None:
        if layers is not None:
            raise ValueError("--layer: allowed with a checkpoint folder only; a named model stands for its layers")
        return Jobs(source.lower(), [], lambda: _named_job(source, inputs, change))
    if not folder.exists():
        _check_folder(folder)
    checkpoint = Checkpoint(folder, change)
    if layers is None:
        raise ValueError(f"--layer: missing; all, or {checkpoint.gates.describe()}, in {folder}")
    wanted = parse_layers(layers, checkpoint)
    return Jobs(str(folder), wanted, lambda: _jobs_of(checkpoint, wanted, folder, inputs), checkpoint)


def _named_job(source: str, inputs: Inputs, change: Callable[[RouterSpec], RouterSpec]) -> Iterator[Job]:
    gate = random_gate(change(_named(source)), inputs.seed, inputs.device)
    yield Job(source.lower(), gate, *inputs.of(gate), f"random weights, seed {inputs.seed}; {inputs.origin}")


def _jobs_of(checkpoint: Checkpoint, layers: list[int], folder: Path, inputs: Inputs) -> Iterator[Job]:
    seed = f", seed {inputs.seed}" if inputs.file is None else ""
    origin = f"weights of the checkpoint; {inputs.origin}{seed}"
    for layer, (spec, tensors) in checkpoint.read_all(layers):
        there: dict[str, Any] = {name: tensor.to(inputs.device) for name, tensor in tensors.items()}
        gate = Gate(spec, **there, frozen=True)
        yield Job(f"{folder}, layer {layer}", gate, *inputs.of(gate), origin, layer)


def parse_layers(text: str, checkpoint: Checkpoint) -> list[int]:
    """The layers of a text such as 3,5-7; of "all": every layer of the checkpoint."""
    if text == "all":
        if not checkpoint.layers:
            raise ValueError(f"--layer: {checkpoint.explain_no_layers()}, in {checkpoint.place}")
        return checkpoint.layers
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--layer: got {text!r}; allowed: all, 3, 3-8, 3,5-7; {checkpoint.gates.describe()}")
        last = int(match[2] or match[1])
        checkpoint.check_has_gate(last)  # before a large range is made
        layers.update(range(int(match[1]), last + 1))
    return sorted(layers)


def change_of(logits_dtype: str | None, top_k: int | None) -> Callable[[RouterSpec], RouterSpec]:
    """The change of specs that the options ask for.

    Raises:
        ValueError: A dtype that logits cannot have.
    """
    if logits_dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"--logits-dtype: got {logits_dtype!r}; allowed: float32, bfloat16")
    given = {"logits_dtype": logits_dtype, "top_k": top_k}
    changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return lambda found: dataclasses.replace(found, **changes)


def load_spec(source: str) -> tuple[str, RouterSpec]:
    """A title and a spec, from a name or a folder with a config.json.

    The spec is the rule of most layers. A .safetensors file stands for its folder, whose path is the title.

    Raises:
        ValueError: An unknown name, or a folder whose config.json is missing, broken or unknown.
    """
    folder = _folder(source)
    if folder is None:
        return source.lower(), _named(source)
    if folder.suffix == ".safetensors" and folder.is_file():
        folder = folder.parent
    _check_folder(folder)
    return str(folder), RouterSpec.from_config(folder)


def check_reads_not(out: Path, titles: Iterable[str]) -> None:
    """Refuses an output file that belongs to a folder that `load_spec` read.

    Raises:
        ValueError: The file is one of a checkpoint's, or would be read as one.
    """
    for folder in map(Path, titles):
        if folder.is_dir() and is_part(out, folder, files_of(folder, {})):
            raise ValueError(f"--out: {out} is a file of the checkpoint {folder}; allowed: another file")


def _folder(source: str) -> Path | None:
    """The source as a path: a checkpoint's folder or file, or the folder of a config.json; None: a name."""
    path = Path(os.path.expanduser(source))  # not Path.expanduser, which raises for unknown users
    path = path.parent if path.name == "config.json" else path
    is_path = os.sep in source or source.startswith((".", "~"))
    if is_path or (source.lower() not in catalog.names() and path.exists()):
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
    if folder.exists():
        allowed = "a folder with a config.json, that file, or a .safetensors file beside it"
        raise ValueError(f"{folder} is no folder; allowed: {allowed}")
    name = folder.name.lower()
    hint = f"did you mean {name!r}? Nothing" if name in catalog.names() else "nothing"
    what = "file" if folder.suffix == ".safetensors" else "folder"
    raise ValueError(f"no {what} {folder}; {hint} is downloaded; `moegate models` lists the names")


def _hidden_of(file: Path, tensors: dict[str, Tensor], needs_ids: bool) -> tuple[Tensor, Tensor | None]:
    """The hidden states of a safetensors file, and the token ids if they are needed."""
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
