"""The command line: `moegate models`, `route`, `check`, `explain`, `engines`, `tune`, `bench`."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Annotated

import typer

from moegate._version import __version__
from moegate.cli import bench, check, engines, explain, models, route, tune
from moegate.cli.output import complain

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    models.models,
    route.route,
    check.check,
    explain.explain,
    engines.engines,
    tune.tune,
    bench.bench,
):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moegate {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The router (gate) of every mixture-of-experts model: hidden states in, expert ids and weights out."""


def main() -> None:
    """Runs the command line on `sys.argv`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # prints ? for characters that the terminal's encoding lacks
    try:
        try:
            app(prog_name="moegate")
        finally:
            if sys.stdout is not None:  # None if the caller closed it
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None:  # an error of a file, not of standard output
            raise
        _leave_stdout()
        if error.errno != errno.EPIPE:
            complain(f"cannot write to standard output: {error.strerror}")
        sys.exit(1)


def _leave_stdout() -> None:
    """Discards what is not written yet, so that Python does not try to write it again at exit."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
