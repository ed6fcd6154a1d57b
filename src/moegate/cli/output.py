"""What the commands share: the console, JSON, and errors in one line."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from moegate.whole_file import why_no_file

MAX_TOKENS = 1 << 20
"""The most tokens that a command takes."""


def console(stderr: bool = False) -> Console:
    """A console that prints text as it stands: no markup, no guessed highlights."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def new_table() -> Table:
    """A table with a rule under its head, two blanks between its columns."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")


def print_json(value: object) -> None:
    """Prints JSON; a NaN or an infinity, which JSON does not have, becomes null.

    Where the output cannot take every letter, those beyond ASCII are escaped.
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    typer.echo(json.dumps(_strict(value), indent=2, ensure_ascii=not encoding.startswith("utf"), allow_nan=False))


def complain(message: object) -> None:
    """One line on stderr."""
    typer.echo(f"moegate: {' '.join(str(message).split())}", err=True)


def fail(message: object) -> NoReturn:
    """One line on stderr, and exit status 2."""
    complain(message)
    raise typer.Exit(2)


def check_out(option: str, out: Path) -> None:
    """Checks that an option names a file that can be written: a new one, or one to be replaced.

    Raises:
        ValueError: A folder, device, pipe or socket; a link that leads to itself; or its folder is not there.
    """
    if os.path.islink(os.path.realpath(out)):  # realpath follows every link but those that end nowhere
        raise ValueError(f"{option}: {out} is a symbolic link that leads back to itself; allowed: a file")
    reason = why_no_file(out)
    if reason is not None:
        raise ValueError(f"{option}: {reason}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Around what users' arguments go through: an error there is theirs, and needs no traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        fail(error)
    except (RuntimeError, MemoryError) as error:
        message = str(error).partition("\n")[0]
        if not isinstance(error, MemoryError) and "memory" not in message:
            raise
        fail(f"not enough memory: {message}")


def _strict(value: object) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_strict(item) for item in value]
    return value
