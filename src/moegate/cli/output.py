"""Output of all commands: the console, tables, JSON, and errors in one line."""

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
"""The largest number of tokens that a command accepts."""


def console(stderr: bool = False) -> Console:
    """A console that prints text unchanged: no markup, no highlighting, no emoji."""
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False)


def new_table() -> Table:
    """A table with a rule under the head and two blanks between columns."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")


def print_json(value: object) -> None:
    """Prints JSON. NaN and infinities, which JSON lacks, become null.

    Characters beyond ASCII are escaped, unless the output's encoding is UTF.
    """
    encoding = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "")
    typer.echo(json.dumps(_strict(value), indent=2, ensure_ascii=not encoding.startswith("utf"), allow_nan=False))


def complain(message: object) -> None:
    """Prints one line on stderr."""
    typer.echo(f"moegate: {' '.join(str(message).split())}", err=True)


def fail(message: object) -> NoReturn:
    """Prints one line on stderr and ends with exit status 2."""
    complain(message)
    raise typer.Exit(2)


def check_out(option: str, out: Path) -> None:
    """Checks that an option names a file that can be written: a new file, or one to be replaced.

    Raises:
        ValueError: A folder, device, pipe or socket; a symbolic link to itself; a file in a missing folder.
    """
    if os.path.islink(os.path.realpath(out)):  # realpath leaves only cyclic links unresolved
        raise ValueError(f"{option}: {out} is a symbolic link that leads back to itself; allowed: a file")
    reason = why_no_file(out)
    if reason is not None:
        raise ValueError(f"{option}: {reason}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Turns exceptions of users' arguments into one line on stderr, without a traceback."""
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
