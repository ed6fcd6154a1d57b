"""Atomic writes: a new file replaces the old one after it was written completely."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path`. The new file replaces `path` when the block ends, and is removed if the block raises.

    Where `path` is a symbolic link, the link's target is replaced. The mode is that of the old file, or the umask's.

    Raises:
        OSError: The folder cannot be written to.
    """
    target = Path(os.path.realpath(path))
    new = target.with_name(f".new-{uuid.uuid4().hex}")
    try:
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = (target if target.exists() else new).stat().st_mode
        yield new
        new.chmod(stat.S_IMODE(mode))  # the block may have replaced the new file by another
        os.replace(new, target)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def why_no_file(path: Path) -> str | None:
    """None, or why no file can be written at a path: something else is there, or the folder is missing.

    Raises:
        OSError: The path cannot be examined.
    """
    if path.exists():
        kind = stat.S_IFMT(path.stat().st_mode)
        return None if kind == stat.S_IFREG else f"{path} is {_KINDS.get(kind, 'no file')}; allowed: a file"
    parent = Path(os.path.realpath(path)).parent
    return None if parent.is_dir() else f"no folder {path.parent if not path.is_symlink() else parent}"
