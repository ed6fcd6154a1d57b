"""Pointers of git-lfs: the text files that a clone has in place of large files that were not fetched."""

from __future__ import annotations

from pathlib import Path

POINTER = "version https://git-lfs.github.com/spec/"
"""How a pointer starts: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""
EXPLANATION = "it is a git-lfs pointer to a file that was not fetched; run `git lfs pull` in its folder"


def why_unreadable(file: Path, error: Exception) -> str:
    """Why a binary file cannot be read: because it is a git-lfs pointer, or as the error says."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(POINTER))
    except OSError:  # the given error already says that the file cannot be read
        return str(error)
    return EXPLANATION if start == POINTER.encode() else str(error)
