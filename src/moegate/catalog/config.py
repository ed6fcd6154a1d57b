"""From a Hugging Face config.json to a `RouterSpec`."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from moegate.catalog.model_types import ModelType, model_types
from moegate.spec import RouterSpec

# Where composite models keep the config of the part that routes.
_NESTED = ("text_config", "thinker_config", "language_config", "llm_config")
_DTYPE_KEYS = ("dtype", "torch_dtype")
_NULL_MEANS_ONE = ("n_group", "topk_group", "routed_scaling_factor")
_SPEC_FIELDS = tuple(field.name for field in fields(RouterSpec))


def spec_from_config(
    config: str | os.PathLike[str] | Mapping[str, Any] | object, *, layer: int | None = None
) -> RouterSpec:
    """See `RouterSpec.from_config`."""
    if layer is not None and layer < 0:
        raise ValueError(f"layer = {layer}; allowed: 0 or more, or None")
    values, model_type = routing_config(config)
    if layer is not None:
        values = {**values, **_of_one_layer(values, layer)}
    found = {name: _field(name, values, model_type, layer) for name in _SPEC_FIELDS}
    spec = {name: value for name, value in found.items() if value is not _ABSENT}
    if model_type.hash_routing_layers is not None and _is_hash_layer(values, model_type.hash_routing_layers, layer):
        spec.update(hash_routing=True, correction_bias=None)
    if spec.get("logits_dtype") == "model":
        spec["logits_dtype"] = "bfloat16" if values.get("dtype", model_type.dtype) == "bfloat16" else "float32"
    if spec.get("logit_softcapping") == 0:
        spec["logit_softcapping"] = None
    if not spec.get("renormalize"):  # then there is no sum that a type's epsilon could be added to
        spec.pop("renormalize_eps", None)
        spec.pop("renormalize_floor", None)
    try:
        return RouterSpec(**spec)
    except (ValueError, TypeError) as error:
        raise ValueError(f"config of model_type {model_type.name!r}: {error}") from None


def routing_config(config: object) -> tuple[dict[str, Any], ModelType]:
    """The part of a config that describes the router, with a `dtype` if any level states one, and its model type."""
    known = model_types()
    seen: list[str] = []
    queue: list[tuple[dict[str, Any], str | None]] = [(_as_dict(config), None)]
    while queue:
        part, outer_dtype = queue.pop(0)
        dtype = _dtype(part) or outer_dtype
        name = part.get("model_type")
        if isinstance(name, str) and name in known:
            own = {key: value for key, value in part.items() if key not in _DTYPE_KEYS}
            return {**own, **({"dtype": dtype} if dtype else {})}, _become(known[name], part)
        if name is not None:
            seen.append(str(name))
        queue.extend((part[key], dtype) for key in _NESTED if isinstance(part.get(key), Mapping))
    if not seen:
        raise ValueError("config: no model_type in it; allowed: a config.json of a mixture-of-experts model")
    close = difflib.get_close_matches(seen[-1], known, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
    got = ", ".join(map(repr, seen))
    raise ValueError(f"config: unknown model_type {got}; {hint}known: {', '.join(sorted(known))}")


def _become(model_type: ModelType, values: dict[str, Any]) -> ModelType:
    """The type that a config really is of, where one name stands for several routers."""
    for rule in model_type.becomes:
        other = rule.get(_text(values.get(rule["key"])))
        if other is not None:
            return model_types()[other]
    return model_type


def _as_dict(config: object) -> dict[str, Any]:
    if isinstance(config, Mapping):
        return dict(config)
    if isinstance(config, (str, os.PathLike)):
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            loaded = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"config: no file {path}") from None
        except OSError as error:
            raise ValueError(f"config: cannot read {path}: {error}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"config: {path} is not JSON: {error}") from None
        if not isinstance(loaded, dict):
            raise ValueError(f"config: {path} holds a {type(loaded).__name__}, not an object")
        return loaded
    to_dict = getattr(config, "to_dict", None)
    if callable(to_dict):
        return dict(to_dict())
    raise TypeError(f"config must be a path, a dict or a configuration with to_dict(), got {type(config).__name__}")


_ABSENT = object()


def _field(name: str, values: dict[str, Any], model_type: ModelType, layer: int | None) -> Any:
    """The value of one spec field: from choices, keys, defaults, or what the type hard-wires."""
    choice = model_type.choices.get(name)
    if choice is not None:
        chosen = _choose(name, choice, values, model_type)
        if chosen != "from_keys":
            return None if chosen == "none" else chosen
    keys = model_type.keys.get(name, ["hidden_size"] if name == "hidden_size" else [])
    for key in keys:
        value = _at(values, key)
        if value is None and name in _NULL_MEANS_ONE and _has(values, key):
            return 1
        if value is not None:
            return _of_layer(name, key, value, layer)
    if name in model_type.defaults:
        return model_type.defaults[name]
    if name in model_type.spec:
        return model_type.spec[name]
    if keys:
        raise ValueError(f"config of model_type {model_type.name!r}: no {' or '.join(keys)}, and no default for {name}")
    return _ABSENT


def _choose(name: str, choice: dict[str, Any], values: dict[str, Any], model_type: ModelType) -> Any:
    key = choice["key"]
    if not _has(values, key):
        return choice.get("absent", "from_keys")
    value = _at(values, key)
    text = _text(value)
    if text in choice:
        return choice[text]
    if "else" in choice:
        return choice["else"]
    allowed = ", ".join(option for option in choice if option not in ("key", "absent"))
    raise ValueError(f"config of model_type {model_type.name!r}: {key} = {value!r}; allowed for {name}: {allowed}")


def _text(value: Any) -> str:
    """What model_types.toml calls a value: its JSON text, or the string itself."""
    return value if isinstance(value, str) else json.dumps(value)


def _of_layer(name: str, key: str, value: Any, layer: int | None) -> Any:
    """The entry of a layer, where a config lists one for each."""
    if not isinstance(value, (list, tuple)):
        return value
    if layer is not None:
        if not 0 <= layer < len(value):
            raise ValueError(f"layer = {layer}; allowed: 0 to {len(value) - 1}, for {key} lists {len(value)} layers")
        return value[layer]
    if not value or any(entry != value[0] for entry in value):
        raise ValueError(f"config: {key} differs between layers ({value}); name the layer to get {name}")
    return value[0]


def _of_one_layer(values: dict[str, Any], layer: int) -> dict[str, Any]:
    """What a config says of this layer alone."""
    layers = values.get("per_layer_config")
    own = layers.get(str(layer)) if isinstance(layers, Mapping) else None
    return dict(own) if isinstance(own, Mapping) else {}


def _is_hash_layer(values: dict[str, Any], rule: dict[str, Any], layer: int | None) -> bool:
    kinds = values.get(rule["key"])
    if isinstance(kinds, (list, tuple)):
        if layer is not None:
            return bool(_of_layer("hash_routing", rule["key"], kinds, layer) == rule["value"])
        return 2 * list(kinds).count(rule["value"]) > len(kinds)
    first = values.get(rule["first_key"])
    return layer is not None and bool(layer < (first if isinstance(first, int) else rule["first_default"]))


def _dtype(values: Mapping[str, Any]) -> str | None:
    stated = next((values[key] for key in _DTYPE_KEYS if values.get(key) is not None), None)
    return None if stated is None else str(stated).removeprefix("torch.")


def _has(values: Any, key: str) -> bool:
    head, _, rest = key.partition(".")
    if isinstance(values, list):
        return head.isdigit() and int(head) < len(values) and (not rest or _has(values[int(head)], rest))
    return isinstance(values, Mapping) and head in values and (not rest or _has(values[head], rest))


def _at(values: Any, key: str) -> Any:
    """What a key with dots leads to, through tables by name and lists by number; None: nothing."""
    if not _has(values, key):
        return None
    head, _, rest = key.partition(".")
    value = values[int(head)] if isinstance(values, list) else values[head]
    return _at(value, rest) if rest else value
