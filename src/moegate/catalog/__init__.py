"""The routers of named models: `names()`, `get_spec("deepseek-v3")`, `get_model(...)` with its source."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import cache
from typing import Any

from moegate.configs.model_types import model_types
from moegate.spec import RouterSpec
from moegate.toml_file import read_toml

__all__ = ["Model", "get_model", "get_spec", "models", "names"]

_CASTS_WEIGHTS = "the reference casts its weights to the model's dtype"


@dataclass(frozen=True)
class Model:
    """A named model."""

    name: str
    """The name for `get_spec`."""
    also: tuple[str, ...]
    """Other models with exactly this router."""
    source: str
    """Where the model's numbers can be checked."""
    note: str | None
    """A remark for users on the model's router, if any."""
    config: dict[str, Any]
    """The part of the model's config.json that the router depends on."""

    @property
    def spec(self) -> RouterSpec:
        """What the model's router computes."""
        return RouterSpec.from_config(self.config)

    @property
    def model_type(self) -> str:
        """The model's `model_type` in config.json."""
        return str(self.config["model_type"])

    @property
    def semantics_source(self) -> str:
        """Where the behaviour of the model type can be checked."""
        return model_types()[self.model_type].source

    @property
    def semantics_note(self) -> str | None:
        """What the model type's reference computes that a spec cannot express, if anything."""
        model_type = model_types()[self.model_type]
        notes = [model_type.note, _CASTS_WEIGHTS if model_type.casts_weights else None]
        return "; ".join(note for note in notes if note) or None


@cache
def models() -> tuple[Model, ...]:
    """All named models, in the order of the catalog."""
    return tuple(
        Model(name, tuple(row.get("also", ())), row["source"], row.get("note"), row["config"])
        for name, row in read_toml("moegate.catalog", "models.toml").items()
    )


@cache
def _by_name() -> dict[str, Model]:
    return {name: model for model in models() for name in (model.name, *model.also)}


def names() -> list[str]:
    """All names that `get_spec` knows, sorted."""
    return sorted(_by_name())


def get_model(name: str) -> Model:
    """The catalog's row of a model.

    Args:
        name: A name or another name of a row, as `names()` lists them, or a hub id that ends in one; case
            does not matter.

    Returns:
        The row. Models with the same router share one.

    Raises:
        TypeError: The name is no string.
        ValueError: An unknown name; the message suggests close ones.
    """
    if not isinstance(name, str):
        raise TypeError(f"name: got {type(name).__name__}; allowed: a str")
    short = name.lower().rpartition("/")[2]
    model = _by_name().get(short)
    if model is None:
        close = difflib.get_close_matches(short, _by_name(), n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
        raise ValueError(f"name: got {name!r}; {hint}allowed: a name of moegate.catalog.names()")
    return model


def get_spec(name: str) -> RouterSpec:
    """What the router of a named model computes.

    ```python
    import moegate

    spec = moegate.get_spec("deepseek-v3")
    assert (spec.hidden_size, spec.num_experts, spec.top_k) == (7168, 256, 8)
    ```

    Args:
        name: As in `catalog.get_model`.

    Returns:
        The spec.

    Raises:
        TypeError: The name is no string.
        ValueError: An unknown name; the message suggests close ones.
    """
    return get_model(name).spec
