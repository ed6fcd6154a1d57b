"""The command line: `moegate models`, `route`, `check`, `explain`, `tune`, `bench`."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from moegate import __version__
from moegate.cli import bench, check, explain, models, route, tune

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (models.models, route.route, check.check, explain.explain, tune.tune, bench.bench):
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
            stream.reconfigure(errors="replace")  # a terminal that has no █ gets a ? in its place
    app(prog_name="moegate")
