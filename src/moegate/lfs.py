"""Pointers of git-lfs: what a clone holds in place of a large file that was not fetched."""

from __future__ import annotations

from pathlib import Path

POINTER = "version https://git-lfs.github.com/spec/"
"""How a pointer starts: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md."""
EXPLANATION = "it is a git-lfs pointer to a file that was not fetched; run `git lfs pull` in its folder"


def why_unreadable(file: Path, error: Exception) -> str:
    """Why a binary file cannot be read: it is a pointer, or else the error says why."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(POINTER))
    except OSError:  # the error that there was says as much
        return str(error)
    return EXPLANATION if start == POINTER.encode() else str(error)
