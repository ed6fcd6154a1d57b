"""The errors of CUDA's C interfaces, as exceptions."""

from __future__ import annotations

from typing import Any


def checked(function: Any, *arguments: Any) -> Any:
    """What a function of the driver or of NVRTC returns beside its error code.

    Raises:
        RuntimeError: The code is an error.
    """
    error, *values = function(*arguments)
    if error != 0:
        raise RuntimeError(f"{function.__name__}: {error.name}")
    return values[0] if values else None
