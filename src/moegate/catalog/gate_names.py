"""Finds the tensors of each layer's gate in a checkpoint, by the names that users gave or that the catalog knows."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

from moegate.catalog.layer_names import Found, LayerNames, alternatives, names_of_role, ranges, strays
from moegate.catalog.stored import ALLOWED, adapters, format_of
from moegate.configs.model_types import ModelType
from moegate.routing import inputs_of
from moegate.spec import RouterSpec


class GateNames:
    """The gates of a checkpoint, found by names alone; no tensor is read.

    Args:
        tensors: The names of all tensors.
        model_type: Has the names to look for.
        given: The names that users gave, by role: see `Gate.from_checkpoint`.
        quant_method: The `quant_method` of config.json, for formats that cannot be recognised by names alone.
    """

    def __init__(
        self, tensors: Collection[str], model_type: ModelType, given: Mapping[str, str], quant_method: object
    ) -> None:
        self._tensors = tensors
        self._model_type = model_type
        self._given = given
        self._quant_method = quant_method
        self._names = LayerNames(tensors, model_type)

    @property
    def layers(self) -> list[int]:
        """The layers with a gate."""
        return [layer for layer in sorted(self._names.layers) if self._has_gate(layer)]

    def describe(self) -> str:
        """The layers with a gate, for errors."""
        layers = self.layers
        if layers:
            return f"layers with a router: {ranges(layers)}"
        names = ", ".join(tail for tail, _ in alternatives(self._model_type, "weight"))
        beside = ", ".join(sorted(self._names.beside))
        return f"no layer has a {names}" + (f" (layers of {beside} are not the model's)" if beside else "")

    def may_have(self, layer: int) -> bool:
        """True if the layer has a gate; with a weight named by users, any layer may have one."""
        return "weight" in self._given or (layer in self._names.layers and self._has_gate(layer))

    def _has_gate(self, layer: int) -> bool:
        if "weight" in self._given:
            return self._given_tensor("weight", layer) is not None
        there = self._names.layers[layer]
        names = [tail for tail, _ in alternatives(self._model_type, "weight")]
        return any(tail in there for tail in names) or self._other_form(layer) is not None

    def _other_form(self, layer: int) -> tuple[str, str] | None:
        """The name behind "layers.L." and the format of a gate that is stored in a quantised format."""
        for tail, _ in alternatives(self._model_type, "weight"):
            module = tail.removesuffix(".weight")
            form = format_of(self._names.leaves(layer, module), self._quant_method)
            if form is not None:
                return f"{module}.{form[0]}", form[1]
        return None

    def check_given_for(self, layers: Sequence[int]) -> None:
        """Refuses a name without {layer} for several layers."""
        for role, name in self._given.items():
            if len(layers) > 1 and name in self._tensors:
                raise ValueError(f"tensors: {role} = {name!r}, for several layers; allowed: {{layer}} in the name")

    def weight(self, layer: int) -> Found:
        """Finds the weight of the layer's gate.

        Raises:
            ValueError: The weight is missing, there twice, in an unreadable format, or has an adapter.
        """
        if "weight" in self._given:
            return self.tensor("weight", layer)
        form = self._other_form(layer)
        if form is not None:
            raise ValueError(f"path: layer {layer}'s gate is stored as {form[0]} ({form[1]}); allowed: {ALLOWED}")
        found = self._names.find(layer, "weight", alternatives(self._model_type, "weight"))
        assert found is not None, layer
        self._refuse_adapters(layer, found)
        return found

    def _refuse_adapters(self, layer: int, weight: Found) -> None:
        assert weight.module is not None
        found = adapters(self._names.leaves(layer, weight.module))
        if found:
            raise ValueError(
                f"path: layer {layer}'s gate has an adapter, {weight.module}.{found[0]}, that is not merged into its "
                f'weight; allowed: a merged checkpoint, or tensors={{"weight": {weight.name!r}}} for the weight alone'
            )

    def tensor(self, role: str, layer: int, weight: Found | None = None) -> Found:
        """Finds a tensor of the layer's gate.

        Args:
            role: The tensor's role.
            layer: The layer.
            weight: The weight found for this layer; the other tensors are in the same part of the model.

        Raises:
            ValueError: The tensor is missing, or there twice.
        """
        if role in self._given:
            found = self._given_tensor(role, layer)
            if found is None:
                name = self._given[role].replace("{layer}", str(layer))
                close = difflib.get_close_matches(name, self._names.layers.get(layer, {}).values(), n=2)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise ValueError(f"tensors: {role} = {self._given[role]!r}; the checkpoint has no {name}{hint}")
            return found
        module, part = (None, None) if weight is None else (weight.module, weight.part)
        tails = names_of_role(self._model_type, role, module)
        found = self._names.find(layer, role, tails, part)
        if found is None:
            tried = ", ".join(f"{self._model_type.layers}.{layer}.{tail}" for tail, _ in tails)
            raise ValueError(f"path: no {role} of layer {layer} in the checkpoint; looked for {tried or 'nothing'}")
        return found

    def _given_tensor(self, role: str, layer: int) -> Found | None:
        """The tensor that the user named, by its full name or by the part of the name behind "layers.L."."""
        name = self._given[role].replace("{layer}", str(layer))
        takes = dict(alternatives(self._model_type, role))
        if name in self._tensors:
            part, tail = self._names.place(name)
            return Found(name, part, tail, None if tail is None else takes.get(tail))
        return self._names.find(layer, role, [(name, takes.get(name))])

    def refuse_strays(self, layer: int, weight: Found, read: Collection[str], spec: RouterSpec) -> None:
        """Refuses a layer with a router tensor that the spec ignores: without the tensor, the gate would route wrongly.

        Args:
            layer: The layer.
            weight: The weight found for this layer.
            read: The names of the tensors that the gate reads.
            spec: What the gate computes.

        Raises:
            ValueError: The layer has such a tensor: a bias, a scale or a table of experts.
        """
        unwanted = [wanted.name for wanted in inputs_of(spec) if not wanted.is_needed]
        tails = strays(self._names.layers.get(layer, {}), weight.module, unwanted)
        ignored = set(self._model_type.other_tensors)
        if spec.hash_routing:  # some checkpoints have a correction bias beside the table, which has no effect
            ignored.update(tail for tail, _ in alternatives(self._model_type, "e_score_correction_bias"))
        names = [name for tail in tails if tail not in ignored for name in self._names.names(layer, tail, weight.part)]
        stray = [name for name in names if name not in read]
        if stray:
            raise ValueError(
                f"path: layer {layer} holds {', '.join(stray)}, which the spec does not take; "
                "allowed: spec= with one that does"
            )
