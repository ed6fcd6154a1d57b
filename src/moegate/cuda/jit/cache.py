"""Compiled kernels on disk, by content: whatever goes wrong here costs a compilation, never a run."""

from __future__ import annotations

import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from moegate.cache_folder import cache_folder
from moegate.warn import warn_once

_DIGEST_BYTES = hashlib.sha256().digest_size


def folder() -> Path:
    """Where the kernels are.

    Raises:
        OSError: See `cache_folder`.
    """
    return cache_folder() / "kernels"


def read(key: str) -> bytes | None:
    """What was written under the key; None if that is nothing, or no longer what was written."""
    try:
        entry = (folder() / key).read_bytes()
    except OSError:
        return None
    digest, code = entry[:_DIGEST_BYTES], entry[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def write(key: str, code: bytes) -> None:
    """Keeps `code` under the key. Of processes that write at once, each writes a file of its own; the last stays."""
    try:
        target = folder()
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _warn(str(error))
        return
    name = None
    try:
        with tempfile.NamedTemporaryFile(dir=target, prefix=".new-", delete=False) as file:
            name = file.name
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(name, target / key)
    except OSError as error:
        if name is not None:
            with suppress(OSError):  # the folder may no longer take changes of any kind
                Path(name).unlink(missing_ok=True)
        # Without the new file's name, which would make each warning a text of its own, said again.
        _warn(f"{error.strerror}: {target}")


def _warn(reason: str) -> None:
    warn_once(
        f"cannot keep compiled kernels ({reason}); each process compiles its own. XDG_CACHE_HOME names another place."
    )
