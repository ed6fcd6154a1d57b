"""Checks of the arguments of `Gate.from_checkpoint`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moegate.catalog.layer_names import ROLES
from moegate.spec import RouterSpec

SpecOrChange = RouterSpec | Callable[[RouterSpec], RouterSpec]


def check_spec(spec: object) -> Any:
    """Returns a `SpecOrChange` or None; anything else is a TypeError."""
    if spec is None or isinstance(spec, RouterSpec) or callable(spec):
        return spec
    allowed = "a RouterSpec, or a function from the one that was found to another"
    raise TypeError(f"spec: got {type(spec).__name__}; allowed: {allowed}")


def check_names(tensors: object) -> dict[str, str]:
    """Returns names of tensors by role; unknown roles and other types are errors."""
    if tensors is None:
        return {}
    if not isinstance(tensors, Mapping):
        raise TypeError(f"tensors: got {type(tensors).__name__}; allowed: a dict from roles to names")
    for role, name in tensors.items():
        if role not in ROLES:
            raise ValueError(f"tensors: got the role {role!r}; allowed: {', '.join(ROLES)}")
        if not isinstance(name, str):
            raise TypeError(f"tensors: {role} = {name!r}; allowed: a str, the name of a tensor")
    return dict(tensors)
