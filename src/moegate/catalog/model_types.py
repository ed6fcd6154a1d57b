"""The model types that carry a router: model_types.toml, read and merged."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

_MERGED = ("spec", "keys", "defaults", "tensors", "choices")


@dataclass(frozen=True)
class ModelType:
    """One table of model_types.toml; the head of that file says what the entries mean."""

    name: str
    source: str
    router: str | None = None
    note: str | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, list[str]] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, list[Any]] = field(default_factory=dict)
    choices: dict[str, dict[str, Any]] = field(default_factory=dict)
    hash_routing_layers: dict[str, Any] | None = None
    layers: str = "layers"
    dtype: str = "float32"
    output_factor: str | None = None
    becomes: list[dict[str, str]] = field(default_factory=list)


def read_toml(name: str) -> dict[str, Any]:
    """A data file of this package."""
    if sys.version_info >= (3, 11):  # here, not above: `import moegate` reads no catalog
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(resources.files("moegate.catalog").joinpath(name).read_text(encoding="utf-8"))


@cache
def model_types() -> dict[str, ModelType]:
    """All model types by their name in a config.json."""
    tables = read_toml("model_types.toml")
    templates = tables.pop("_template")
    return {name: ModelType(name=name, **_resolved(table, tables, templates)) for name, table in tables.items()}


def _resolved(table: dict[str, Any], tables: dict[str, Any], templates: dict[str, Any]) -> dict[str, Any]:
    """The table with its parents' entries merged in."""
    table = dict(table)
    parent_name = table.pop("like", None)
    if parent_name is None:
        return table
    parent = _resolved(templates.get(parent_name) or tables[parent_name], tables, templates)
    for own in ("router", "source", "note", "becomes", "output_factor"):
        parent.pop(own, None)
    for merged in _MERGED:
        table[merged] = {**parent.get(merged, {}), **table.get(merged, {})}
    return {**parent, **table}
