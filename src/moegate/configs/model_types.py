"""Reads and merges the tables of types/, the data about model types. types/README.md defines the entries."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from moegate.toml_file import read_toml

_ROUTERS = (
    *("deepseek_v3", "sigmoid", "sqrtsoftplus"),
    *("softmax", "softmax_bias", "softmax_deepseek", "softmax_qwen", "topk_softmax"),
)
_MERGED = ("spec", "keys", "defaults", "tensors", "choices", "ignores", "differs")
_NOT_INHERITED = ("router", "source", "note", "becomes", "also", "architectures", "output_factor", "casts_weights")
_TASK = re.compile(r"(For[A-Z][A-Za-z]*|LMHeadModel|Model)$")


@dataclass(frozen=True)
class ModelType:
    """One table of types/, with the entries that the table inherits."""

    name: str
    source: str
    router: str | None = None
    note: str | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, list[Any]] = field(default_factory=dict)
    other_tensors: list[str] = field(default_factory=list)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignores: dict[str, str] = field(default_factory=dict)
    differs: dict[str, dict[str, str]] = field(default_factory=dict)
    dense: list[dict[str, Any]] = field(default_factory=list)
    hash_routing_layers: dict[str, Any] | None = None
    layers: str = "layers"
    dtype: str = "float32"
    casts_weights: bool = False
    output_factor: str | None = None
    becomes: list[dict[str, str]] = field(default_factory=list)
    architectures: list[str] = field(default_factory=list)

    @property
    def fields(self) -> tuple[str, ...]:
        """The RouterSpec fields that the table has entries for, the number of experts first."""
        named = (*self.choices, *self.keys, *self.defaults, *self.spec)
        return tuple(dict.fromkeys(("num_experts", "hidden_size", *named)))

    def keys_of(self, name: str) -> list[str]:
        """The config keys that a RouterSpec field is read from; the first one present wins."""
        return self.keys.get(name, ["hidden_size"] if name == "hidden_size" else [])

    @property
    def read_keys(self) -> frozenset[str]:
        """Every config key that affects the router of this type."""
        rules = [*self.choices.values(), *self.becomes, *self.dense]
        listed = [key for name in self.fields for key in self.keys_of(name)]
        hashed = self.hash_routing_layers or {}
        return frozenset([*listed, *(rule["key"] for rule in rules), *map(str, hashed.values())])


@dataclass(frozen=True)
class RoutingKeys:
    """The config keys that some engine reads as routing."""

    states: dict[str, list[str]]
    """RouterSpec field -> the keys whose value is the field's value."""
    means: dict[str, dict[str, dict[str, Any]]]
    """Key -> the key's value, as JSON text -> the RouterSpec fields that this value states."""


def read_tables(name: str) -> dict[str, Any]:
    """The tables of types/NAME.toml."""
    return read_toml("moegate.configs", f"types/{name}.toml")


@cache
def model_types() -> dict[str, ModelType]:
    """All model types with a router, by `model_type`."""
    templates = read_tables("templates")
    tables: dict[str, dict[str, Any]] = {}
    for kind in _ROUTERS:
        for name, table in read_tables(kind).items():
            assert name not in tables, f"two tables of model type {name}"
            tables[name] = table
    for name, table in list(tables.items()):
        for other, source in table.get("also", {}).items():
            assert other not in tables, f"two tables of model type {other}"
            tables[other] = {"like": name, "source": source}
    return {name: ModelType(name=name, **_resolved(table, tables, templates)) for name, table in tables.items()}


def _resolved(table: dict[str, Any], tables: dict[str, Any], templates: dict[str, Any]) -> dict[str, Any]:
    """The table with its parents' entries merged in."""
    table = {key: value for key, value in table.items() if key != "also"}
    parent_name = table.pop("like", None)
    if parent_name is None:
        return table
    parent = _resolved(templates.get(parent_name) or tables[parent_name], tables, templates)
    for own in _NOT_INHERITED:
        parent.pop(own, None)
    for merged in _MERGED:
        table[merged] = {**parent.get(merged, {}), **table.get(merged, {})}
    return {**parent, **table}


@cache
def wrappers() -> dict[str, dict[str, str]]:
    """By composite type: the config keys of the inner config with the router, each with that config's type."""
    tables = read_tables("wrappers")
    return {name: {key: inner for key, inner in table.items() if key != "source"} for name, table in tables.items()}


@cache
def refused() -> dict[str, str]:
    """By refused type: the reason."""
    return {name: table["reason"] for name, table in read_tables("refused").items()}


@cache
def routing_keys() -> RoutingKeys:
    """The config keys that some engine reads as routing."""
    table = read_tables("routing_keys")
    return RoutingKeys(table["states"], table["means"])


@cache
def type_of_architecture(architecture: str) -> str | None:
    """The model type, composite type or refused type of a class name in `architectures`; None: unknown.

    The class is listed in a table, or is named like its type in another case ("Qwen3MoeForCausalLM", "qwen3_moe").
    """
    listed = {name: entry.name for entry in model_types().values() for name in entry.architectures}
    if architecture in listed:
        return listed[architecture]
    plain = {_squeezed(name): name for name in (*refused(), *wrappers(), *model_types())}
    bare = _squeezed(_TASK.sub("", architecture))
    # The ForCausalLM class of a composite type is the class of its text config: Gemma4ForCausalLM.
    close = (f"{bare}text", bare) if architecture.endswith("ForCausalLM") else (bare, f"{bare}text")
    return next((plain[name] for name in close if name in plain), None)


def _squeezed(name: str) -> str:
    return re.sub("[^a-z0-9]", "", name.lower())
