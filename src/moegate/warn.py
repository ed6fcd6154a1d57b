"""Warnings about slow paths and ignored settings."""

from __future__ import annotations

import warnings
from functools import cache


@cache
def warn_once(message: str) -> None:
    """A `RuntimeWarning`, once a process for each text, since a model has a router in every layer."""
    warnings.warn(f"moegate: {message}", RuntimeWarning, stacklevel=2)
