"""Finds the part of a config.json that describes the router, and that part's model type."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moegate.configs.lookup import at, has, text_of
from moegate.configs.model_types import (
    ModelType,
    model_types,
    refused,
    routing_keys,
    type_of_architecture,
    wrappers,
)
from moegate.json_file import read_json

# The keys of composite configs that may hold the inner config with the router.
_NESTED = ("text_config", "thinker_config", "language_config", "llm_config")
_DTYPE_KEYS = ("dtype", "torch_dtype")


class Part(NamedTuple):
    """A config, or a config inside of it."""

    values: dict[str, Any]
    type_name: str | None
    """The type: as stated, by class, or by the wrapper around it; else the class's name. None: there is no hint."""


def routing_config(config: object) -> tuple[dict[str, Any], ModelType]:
    """The part of a config that describes the router, with the `dtype` that any level states, and its model type.

    Args:
        config: See `RouterSpec.from_config`.

    Raises:
        TypeError: Not a config.
        ValueError: A file that is missing or broken; no part with a router: the message has the reason.
    """
    try:
        parts = list(_parts(_as_dict(config), None, None))
    except RecursionError:
        raise ValueError("config: nested too deeply") from None
    routers = [part for part in parts if part.type_name in model_types()]
    # The innermost part with a number of experts; if there is none, the innermost part gives the error.
    part = next((part for part in routers if _counts_experts(part.values)), next(iter(routers), None))
    if part is None:
        raise ValueError(_without_router(parts))
    return part.values, _become(model_types()[str(part.type_name)], part.values)


def _parts(values: dict[str, Any], type_name: str | None, dtype: str | None) -> Iterator[Part]:
    """The configs inside of a config, innermost first, then the config itself."""
    dtype = _dtype(values) or dtype
    name = type_name if type_name is not None and values.get("model_type") is None else _type_name(values)
    inner_types = wrappers().get(name or "", {})
    own_type = name if name in model_types() else None
    for key in dict.fromkeys((*inner_types, *_NESTED)):
        if isinstance(values.get(key), Mapping):
            yield from _parts(dict(values[key]), inner_types.get(key, own_type), dtype)
    own = {key: value for key, value in values.items() if key not in _DTYPE_KEYS}
    inherited = {"model_type": name, "dtype": dtype}  # make the part a complete config
    yield Part({**own, **{key: value for key, value in inherited.items() if value}}, name)


def _type_name(values: dict[str, Any]) -> str | None:
    """The stated type if it is known; else the type of a known class; else the stated type."""
    stated = values.get("model_type")
    if stated is not None and (text_of(stated) in model_types() or text_of(stated) in wrappers()):
        return text_of(stated)
    listed = values.get("architectures")
    classes = [name for name in listed if isinstance(name, str)] if isinstance(listed, (list, tuple)) else []
    known = [name for name in map(type_of_architecture, classes) if name is not None]
    if stated is not None:
        return next((name for name in known if name in model_types()), text_of(stated))
    return next(iter(known + classes), None)


def _counts_experts(values: dict[str, Any]) -> bool:
    counts = (at(values, key) for key in routing_keys().states["num_experts"])
    return any(count is not None and not (isinstance(count, (int, float)) and count in (0, 1)) for count in counts)


def _become(model_type: ModelType, values: dict[str, Any]) -> ModelType:
    """The config's actual type, by the `becomes` rules of a type whose name stands for several routers."""
    for rule in model_type.becomes:
        other = rule.get(text_of(at(values, rule["key"]))) if has(values, rule["key"]) else None
        if other is not None:
            return model_types()[other]
    return model_type


def _without_router(parts: list[Part]) -> str:
    """The error message of a config in which no part has a router."""
    names = [part.type_name for part in reversed(parts) if part.type_name is not None]
    if not names:
        return "config: no model_type in it; allowed: a config.json of a mixture-of-experts model"
    for name in names:
        if name in refused():
            return f"config: model_type {name!r} is refused: {refused()[name]}"
    got = ", ".join(map(repr, names))
    if not any(_counts_experts(part.values) for part in parts):
        return f"config: {got}: this model has no experts, for no key that counts experts is in its config"
    unknown = [name for name in names if name not in wrappers()]
    if not unknown:
        asked = " or ".join(key for name in names for key in wrappers()[name])
        return f"config: {got} is a composite type, and there is no {asked} with a router in it"
    close = [*_inner_types(names), *difflib.get_close_matches(unknown[-1], model_types(), n=3)]
    hint = f"did you mean {' or '.join(map(repr, dict.fromkeys(close)))}? " if close else ""
    allowed = "allowed: the model types that docs/configs.md lists"
    return f"config: unknown model_type {', '.join(map(repr, unknown))}; {hint}{allowed}"


def _inner_types(names: list[str]) -> list[str]:
    """The types of the inner configs of the composite types among the names."""
    return [inner for name in names for inner in wrappers().get(name, {}).values() if inner in model_types()]


def _as_dict(config: object) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, (str, os.PathLike)):
        return _read(Path(config))
    to_dict = getattr(config, "to_dict", None)
    values = to_dict() if callable(to_dict) else None
    if isinstance(values, Mapping):
        return dict(values)
    raise TypeError(f"config must be a path, a dict or a configuration with to_dict(), got {type(config).__name__}")


def _read(path: Path) -> dict[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    if not os.path.lexists(path):
        raise ValueError(f"config: no file {path}")
    loaded = read_json(path, "config:")
    if not isinstance(loaded, dict):
        raise ValueError(f"config: {path} holds a {type(loaded).__name__}, not an object")
    return loaded


def _dtype(values: Mapping[str, Any]) -> str | None:
    stated = next((values[key] for key in _DTYPE_KEYS if values.get(key) is not None), None)
    return None if stated is None else str(stated).removeprefix("torch.")
