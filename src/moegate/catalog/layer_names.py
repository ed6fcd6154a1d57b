"""Assigns the tensors of a checkpoint to layers and roles of the gate, in one pass over all names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from moegate.configs.model_types import ModelType, model_types
from moegate.routing import RouterTensors

ROLES = ("weight", *RouterTensors._fields)
"""The tensors of a gate."""

# Words in the names of parts whose layers are counted from 0 again: multi-token-prediction heads, draft models, vision
# and audio encoders, speech models.
_BESIDE = {"mtp", "nextn", "eagle", "eagle3", "medusa", "dspark", "draft", "drafter", "speculator"}
_BESIDE |= {"vision", "visual", "vit", "audio", "speech", "talker", "predictor"}
_TEXT = {"text", "language"}  # "vision_language_model" is the model itself
# What PEFT (https://github.com/huggingface/peft, tuners/tuners_utils.py and utils/other.py), torch.compile and FSDP
# insert between a module's name and its tensors' names.
_PEFT = re.compile(r"\.base_layer(?=\.)|\.modules_to_save\.[^.]+(?=\.)")
_WRAPPERS = re.compile(rf"{_PEFT.pattern}|(?:^|(?<=\.))_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")

_UNTRAINED = re.compile(r"(?:^|\.)original_module\.")  # PEFT's copy of a module of modules_to_save, before training


@dataclass(frozen=True)
class Found:
    """A tensor of a layer."""

    name: str
    """The full name in the checkpoint."""
    part: str | None
    """The part of the model: the name before "layers.L."."""
    tail: str | None
    """The name behind "layers.L.", without wrappers; None: the user gave a full name that is in no layer."""
    take: str | None = None
    """How the tensor is transformed: see `tensors` in configs/types/README.md."""

    @property
    def module(self) -> str | None:
        """The name of the weight's module, behind "layers.L."."""
        return None if self.tail is None else self.tail.removesuffix(".weight")


class LayerNames:
    """The names of a checkpoint, by layer and by tail: the name behind "layers.L."."""

    def __init__(self, names: Iterable[str], model_type: ModelType) -> None:
        self.layers: dict[int, dict[str, str]] = {}
        """The full name by layer and tail; of several names, the first."""
        self.beside: set[str] = set()
        """Parts whose layers are not the language model's: "mtp", "model.visual"."""
        self._several: dict[tuple[int, str], list[str]] = {}
        self._list = model_type.layers + "."
        self._pattern = re.compile(rf"(?:(.*?)\.)?{re.escape(self._list)}([0-9]{{1,9}})\.(.+)")
        is_beside: dict[str, bool] = {}
        for name in names:
            part, layer, tail = self._split(name)
            if layer is None or ("original_module." in name and _UNTRAINED.search(name)):
                continue
            if part not in is_beside:
                is_beside[part] = _is_beside(part, model_type)
            if is_beside[part]:
                self.beside.add(part)
                continue
            first = self.layers.setdefault(layer, {}).setdefault(tail, name)
            if first is not name:
                self._several.setdefault((layer, tail), [first]).append(name)

    def _split(self, name: str) -> tuple[str, int | None, str]:
        """Part, layer and tail of a name, without wrappers; the layer is None for a name outside of layers."""
        before, _, behind = name.partition(self._list)
        number, _, tail = behind.partition(".")
        if tail and number.isdecimal() and number.isascii() and len(number) < 10 and (not before or before[-1] == "."):
            return before[:-1], int(number), unwrapped(tail)
        match = self._pattern.fullmatch(name)  # much slower; needed for names such as "player_layers.x.layers.3."
        return ("", None, "") if match is None else (match[1] or "", int(match[2]), unwrapped(match[3]))

    def place(self, name: str) -> tuple[str | None, str | None]:
        """Part and tail of a name, without wrappers; both None for a name outside of layers."""
        part, layer, tail = self._split(name)
        return (None, None) if layer is None else (part, tail)

    def names(self, layer: int, tail: str, part: str | None = None) -> list[str]:
        """All full names of a layer with this tail and, unless None, in this part of the model."""
        first = self.layers.get(layer, {}).get(tail)
        every = self._several.get((layer, tail), [] if first is None else [first])
        return [name for name in every if part is None or self._split(name)[0] == part]

    def find(
        self, layer: int, role: str, tails: Iterable[tuple[str, str | None]], part: str | None = None
    ) -> Found | None:
        """The single tensor of the layer with one of these tails; None: there is none.

        Raises:
            ValueError: There are several.
        """
        found = [
            Found(name, self._split(name)[0], tail, take)
            for tail, take in tails
            for name in self.names(layer, tail, part)
        ]
        if len(found) > 1:
            names = ", ".join(match.name for match in found)
            raise ValueError(
                f"path: more than one tensor could be the {role} of layer {layer}: {names}; "
                f'allowed: one, or tensors={{"{role}": NAME}}'
            )
        return found[0] if found else None

    def leaves(self, layer: int, module: str) -> list[str]:
        """The names behind a module's name in the layer: "qweight" for "mlp.gate.qweight"."""
        start = module + "."
        return [tail[len(start) :] for tail in self.layers.get(layer, {}) if tail.startswith(start)]


def unwrapped(tail: str) -> str:
    """A tail without what wrappers inserted; fast, since a checkpoint has tens of thousands of names."""
    is_wrapped = "._" in tail or tail.startswith("_") or ".base_layer." in tail or ".modules_to_save." in tail
    return _WRAPPERS.sub("", tail) if is_wrapped else tail


def is_peft(name: str) -> bool:
    """True if PEFT wrapped the module of the tensor with this name."""
    return _PEFT.search(name) is not None


def _is_beside(part: str, model_type: ModelType) -> bool:
    """True for a part whose layers a config of this type does not describe."""
    own = set(re.split(r"[._]", model_type.name))  # a talker or a vision encoder with a type of its own is the model
    return any((words & _BESIDE) - own and not words & _TEXT for words in map(_words, part.split(".")))


def _words(segment: str) -> set[str]:
    return set(segment.lower().split("_"))


def alternatives(model_type: ModelType, role: str) -> list[tuple[str, str | None]]:
    """The tails that a tensor may have, each with its `take`."""
    entries: list[Any] = model_type.tensors.get(role, [])
    return [(entry, None) if isinstance(entry, str) else (entry["name"], entry.get("take")) for entry in entries]


def names_of_role(model_type: ModelType, role: str, module: str | None) -> list[tuple[str, str | None]]:
    """The tails that a tensor may have; any type's tails, if the spec has the tensor but no gate of the type does."""
    own = alternatives(model_type, role)
    if own or role == "weight":
        return own
    own_name = [] if module is None else [f"{module}.{role}"]
    others = [name for name in known_names(role) if role == "bias" or not name.endswith(".bias")]
    return [(name, None) for name in dict.fromkeys(own_name + others)]


@cache
def known_names(role: str) -> tuple[str, ...]:
    """All tails that any model type has for a role."""
    every = (name for model_type in model_types().values() for name, _ in alternatives(model_type, role))
    return tuple(dict.fromkeys(every))


@cache
def any_type() -> ModelType:
    """The type for checkpoints whose config does not describe the router: with the names of all types."""
    others = [name for model_type in model_types().values() for name in model_type.other_tensors]
    return ModelType("any", "", tensors={role: list(known_names(role)) for role in ROLES}, other_tensors=others)


def strays(there: Mapping[str, object], module: str | None, unwanted: Iterable[str]) -> list[str]:
    """The tails of a layer's tensors that affect routing, but that the spec ignores.

    Args:
        there: The layer's tensors, by tail.
        module: The gate's module; every bias in this module counts.
        unwanted: The roles that the spec ignores.
    """
    found = {name for role in unwanted for name in known_names(role) if name in there}
    if "e_score_correction_bias" in unwanted:
        found.update(tail for tail in there if tail.endswith(_correction_leaves()))
    if module is not None:
        own_leaves = set(unwanted) - {"input_scale"}  # in quantised modules, the scale of the activations
        for tail in there:
            if tail.startswith(module + "."):
                leaf = tail.rpartition(".")[2]
                found.update([tail] if "bias" in leaf or leaf in own_leaves else [])
    return sorted(found)


@cache
def _correction_leaves() -> tuple[str, ...]:
    """The endings of correction biases' names, except "bias", which other biases have too."""
    leaves = {name.rpartition(".")[2] for name in known_names("e_score_correction_bias")} - {"bias"}
    return tuple(f".{leaf}" for leaf in leaves)


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] -> "1-3, 7"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
