"""Looks up values of a config.json by the keys of types/README.md, whose dots descend into tables and lists."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from operator import index
from typing import Any, SupportsIndex

_LITERAL = re.compile(r"true|false|null|-?\d+(\.\d+)?")


def has(values: Any, key: str) -> bool:
    """True if the key exists; its value may be None."""
    head, _, rest = key.partition(".")
    if isinstance(values, (list, tuple)):
        return head.isdigit() and int(head) < len(values) and (not rest or has(values[int(head)], rest))
    return isinstance(values, Mapping) and head in values and (not rest or has(values[head], rest))


def at(values: Any, key: str) -> Any:
    """The key's value; None if the key does not exist."""
    if not has(values, key):
        return None
    head, _, rest = key.partition(".")
    value = values[int(head)] if isinstance(values, (list, tuple)) else values[head]
    return at(value, rest) if rest else value


def text_of(value: Any) -> str:
    """A value as the tables write it: its JSON text, or a plain string if that is no JSON number, bool or null."""
    if isinstance(value, str) and not _LITERAL.fullmatch(value):
        return value
    try:
        return json.dumps(value, default=repr)
    except (TypeError, ValueError, RecursionError):  # not representable: keys that are no strings, a cyclic value
        return f"a {type(value).__name__}"


def of_layer(key: str, value: Any, layer: int | None, wanted: str) -> Any:
    """The entry of a layer, if the value is a list with an entry for each layer; else the value itself.

    `wanted`: the name of the value in error messages.

    Raises:
        ValueError: No such layer; or `layer` is None, and the layers differ.
    """
    if not isinstance(value, (list, tuple)):
        return value
    if layer is not None:
        if not 0 <= layer < len(value):
            raise ValueError(f"layer = {layer}; allowed: 0 to {len(value) - 1}, for {key} lists {len(value)} layers")
        return value[layer]
    if not value:
        raise ValueError(f"config: {key} is an empty list, which has no {wanted}")
    if any(entry != value[0] for entry in value):
        raise ValueError(f"config: {key} differs between layers ({value}); name the layer to get {wanted}")
    return value[0]


def check_layer(layer: object) -> int:
    """Returns the number of a layer; anything but a non-negative int is an error."""
    if isinstance(layer, bool) or not isinstance(layer, SupportsIndex):
        raise TypeError(f"layer: got {type(layer).__name__}; allowed: an int")
    number = index(layer)
    if number < 0:
        raise ValueError(f"layer = {number}; allowed: 0 or more")
    return number
