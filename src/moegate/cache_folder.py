"""Where moegate keeps what can be made again: compiled kernels and cost tables."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """The folder of moegate in the user's cache; XDG_CACHE_HOME moves it, as it moves everybody's.

    Raises:
        OSError: The user has no home, or the path is relative, which would be another folder in each program.
    """
    try:
        folder = user_cache_path("moegate")
    except RuntimeError as error:
        raise OSError(f"no cache folder: {error}") from None
    if not folder.is_absolute():  # which older platformdirs return
        raise OSError(f"no cache folder: {folder} is a relative path")
    return folder
