"""The cache folder, for compiled kernels and cost tables."""

from __future__ import annotations

from pathlib import Path

from platformdirs import user_cache_path


def cache_folder() -> Path:
    """The folder of moegate in the user's cache folder, which XDG_CACHE_HOME names.

    Raises:
        OSError: The user has no home; or the path is relative, and would depend on the working directory.
    """
    try:
        folder = user_cache_path("moegate")
    except RuntimeError as error:
        raise OSError(f"no cache folder: {error}") from None
    if not folder.is_absolute():  # older platformdirs return a relative XDG_CACHE_HOME
        raise OSError(f"no cache folder: {folder} is a relative path")
    return folder
