"""Compiled kernels on disk, by content: whatever goes wrong here costs a compilation, never a run."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from platformdirs import user_cache_path

from moegate.warn import warn_once

_DIGEST_BYTES = hashlib.sha256().digest_size


def folder() -> Path:
    """The user's cache folder; XDG_CACHE_HOME moves it, as it moves everybody's."""
    return user_cache_path("moegate") / "kernels"


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
    target, name = folder(), None
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target, prefix=".new-", delete=False) as file:
            name = file.name
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(name, target / key)
    except OSError as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        warn_once(
            f"cannot keep compiled kernels in {target} ({error}); each process compiles its own. XDG_CACHE_HOME names "
            "another place."
        )
