"""The check that SGLang applied the hooks: it only logs one that it cannot apply."""

from __future__ import annotations

import logging
import pkgutil
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

_log = logging.getLogger("moegate")
_asked: dict[str, Any] = {}


def expect(target: str, hook: Any) -> None:
    """Notes a hook that SGLang was asked for."""
    _asked[target] = hook


@cache
def check() -> None:
    """Warns once of the hooks that are not in place."""
    missing = [target for target, hook in _asked.items() if not _is_in_place(target, hook)]
    if missing:
        _log.warning("moegate asked SGLang for hooks that are not in place: %s", ", ".join(missing))


def _is_in_place(target: str, hook: Any) -> bool:
    found = pkgutil.resolve_name(target)
    if isinstance(hook, type):
        return isinstance(found, type) and issubclass(found, hook)
    return any(hook in _closure(wrapper) for wrapper in _chain(found))


def _chain(function: Callable[..., Any]) -> list[Any]:
    """A function, and those that it wraps."""
    found = [function]
    while (inner := getattr(found[-1], "__wrapped__", None)) is not None:
        found.append(inner)
    return found


def _closure(function: Any) -> list[Any]:
    cells = function.__closure__ if isinstance(function, FunctionType) else None
    return [cell.cell_contents for cell in cells or ()]
