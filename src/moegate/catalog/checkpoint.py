"""Reads gates from a local Hugging Face checkpoint: config.json and safetensors."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moegate.catalog.files import Reader, check_path, explain_no_config, files_of, is_part, tensor_files
from moegate.catalog.gate_names import GateNames
from moegate.catalog.layer_names import Found, any_type, is_peft, ranges
from moegate.catalog.options import SpecOrChange, check_names, check_spec
from moegate.catalog.stored import ALLOWED, FLOAT8, FLOAT8_SCALES, block_size, dequantised, shaped
from moegate.configs.lookup import check_layer
from moegate.configs.model_types import ModelType
from moegate.configs.routing_part import routing_config
from moegate.json_file import read_json
from moegate.routing import FLOATS, inputs_of
from moegate.spec import RouterSpec
from moegate.warn import warn_once

_NUM_LAYERS = ("num_hidden_layers", "n_layers", "num_layers")


class Checkpoint:
    """A local checkpoint: its names are parsed once, and each of its files is opened at most once.

    Args, errors: See `Gate.from_checkpoint`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: SpecOrChange | None = None,
        tensors: Mapping[str, str] | None = None,
    ) -> None:
        self.place = check_path(path)
        self._folder = self.place if self.place.is_dir() else self.place.parent
        self._spec = check_spec(spec)
        self._given = check_names(tensors)
        self._config, self._model_type = self._routing_config()
        self._files = tensor_files(self.place)
        self.gates = GateNames(self._files, self._model_type, self._given, self._quantization.get("quant_method"))
        """Which tensors are gates."""
        self._reader = Reader(self._files)
        self._unused = set(self._given)

    @property
    def layers(self) -> list[int]:
        """The model's layers with a gate. Later ones are heads that predict further tokens."""
        count = self._num_layers
        return [layer for layer in self.gates.layers if count is None or layer < count]

    @cached_property
    def _num_layers(self) -> int | None:
        """How many layers config.json counts; None: it does not say."""
        key = next((key for key in _NUM_LAYERS if self._config.get(key) is not None), None)
        if key is None:
            return None
        count = self._config[key]
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"path: {self._folder / 'config.json'}: {key} = {count!r}; allowed: an int, 0 or more")
        return count

    def explain_no_layers(self) -> str:
        """Why `layers` is empty, for errors."""
        gated, count = self.gates.layers, self._num_layers
        if not gated:
            return self.gates.describe()
        several = len(gated) > 1
        which = f"the layers with a router, {ranges(gated)}, are" if several else f"layer {gated[0]}, with a router, is"
        counted = "1 layer" if count == 1 else f"{count} layers"
        return f"config.json counts {counted}; {which} past it; allowed: {'these' if several else 'it'} by number"

    def has_part(self, file: Path) -> bool:
        """Whether writing this file would change the checkpoint; the file may be missing."""
        return is_part(file, self._folder, files_of(self._folder, self._files))

    def check_has_gate(self, layer: int) -> None:
        """Refuses a layer without a gate."""
        if not self.gates.may_have(layer):
            raise ValueError(f"layer = {layer}; allowed: {self.gates.describe()}, in {self.place}")

    def read_all(
        self, layers: Iterable[int] | None = None
    ) -> Iterator[tuple[int, tuple[RouterSpec, dict[str, Tensor]]]]:
        """The spec and the tensors of the gates of several layers, by their names in `Gate`; None: of `layers`."""
        wanted = self.layers if layers is None else sorted({check_layer(layer) for layer in layers})
        if layers is None and not wanted:
            raise ValueError(f"path: {self.explain_no_layers()}, in {self.place}")
        self.gates.check_given_for(wanted)
        for layer in wanted:
            self.check_has_gate(layer)
        for layer in wanted:
            yield layer, self._read(layer)
        if wanted:
            self._check_all_given_read()

    def _read(self, layer: int) -> tuple[RouterSpec, dict[str, Tensor]]:
        at = self.gates.weight(layer)
        weight, dtype = self._weight(at, layer)
        spec = self._spec_of(layer, dtype)
        weight = weight if spec.weight_dtype == "float32" else weight.to(dtype)
        tensors = {"weight": shaped("weight", weight, at.name, at.take, spec)}
        roles = [wanted.name for wanted in inputs_of(spec)[1:] if wanted.is_needed]
        places = {role: self.gates.tensor(role, layer, at) for role in roles}
        for role, found in places.items():
            tensors[role] = shaped(role, self._reader.read(found.name), found.name, found.take, spec)
        read = {at.name, *(found.name for found in places.values())}
        self.gates.refuse_strays(layer, at, read, spec)
        self._unused -= tensors.keys()
        if any(map(is_peft, read)):
            warn_once(f"the gates of {self.place} go by names that PEFT gives to wrapped modules; read as the gates")
        return spec, tensors

    def _check_all_given_read(self) -> None:
        """Refuses names for tensors that no gate that was read takes."""
        if self._unused:
            raise ValueError(f"tensors: got {', '.join(sorted(self._unused))}; the spec takes no such tensor")

    def _routing_config(self) -> tuple[dict[str, Any], ModelType]:
        config_file = self._folder / "config.json"
        try:
            with _naming(config_file):
                return routing_config(self._folder)
        except ValueError:
            if isinstance(self._spec, RouterSpec):  # says all that the config would
                return {}, any_type()
            explain_no_config(config_file)
            raise

    @cached_property
    def _quantization(self) -> Mapping[str, Any]:
        """What config.json says of quantisation, of a composite model at its top."""
        if not self._config:
            return {}
        whole = read_json(self._folder / "config.json", "path:")
        found = whole.get("quantization_config") or self._config.get("quantization_config")
        return found if isinstance(found, Mapping) else {}

    def _weight(self, at: Found, layer: int) -> tuple[Tensor, torch.dtype]:
        """The weight as it is stored, in float32 where that is FP8, and the dtype that its gate is to have."""
        weight = self._reader.read(at.name)
        start = at.name.removesuffix("weight")
        scales = [start + leaf for leaf in FLOAT8_SCALES if start + leaf in self._files]
        if weight.dtype in FLOAT8:
            return self._dequantised(weight, at, scales)
        if scales and not scales[0].endswith(".scale"):
            got = f"{at.name} in {weight.dtype} with {scales[0]}"
            raise ValueError(f"path: layer {layer}'s gate is stored as {got}; allowed: {ALLOWED}")
        return weight, weight.dtype

    def _dequantised(self, weight: Tensor, at: Found, scales: list[str]) -> tuple[Tensor, torch.dtype]:
        """A float8 weight times its scale, and the model's dtype; bfloat16 if the config states none.

        That is the dtype of the gate before it was quantised. float32 would hold the product exactly, at twice the
        bytes a call; what it would save is far below the error of the float8.
        """
        if len(scales) != 1:
            got = f"{len(scales)} scales" if scales else "no scale"
            raise ValueError(f"path: {at.name} has dtype {weight.dtype} and {got} beside it; allowed: {ALLOWED}")
        block = block_size(self._quantization.get("weight_block_size"))
        exact = dequantised(weight, self._reader.read(scales[0]), (at.name, scales[0]), block)
        dtype = getattr(torch, str(self._config.get("dtype")), None)
        return exact, dtype if dtype in FLOATS else torch.bfloat16

    def _spec_of(self, layer: int, dtype: torch.dtype) -> RouterSpec:
        if isinstance(self._spec, RouterSpec):
            return self._spec
        config = {"dtype": str(dtype).removeprefix("torch."), **self._config}
        with _naming(self._folder / "config.json"):
            found = RouterSpec.from_config(config, layer=layer)
        if self._spec is None:
            return found
        changed = self._spec(found)
        if not isinstance(changed, RouterSpec):
            raise TypeError(f"spec: got a function that returns {type(changed).__name__}; allowed: a RouterSpec")
        return changed


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Errors of what is in the file name it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error) if str(file) in str(error) else f"path: {file}: {error}") from None
