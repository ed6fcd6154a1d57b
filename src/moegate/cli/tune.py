"""`moegate tune`: measures a cost table of this machine."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moegate.cli.output import check_out, complain, console, errors_in_one_line, fail
from moegate.cli.progress import INTERRUPTED, need_gpu, progress_bar

if TYPE_CHECKING:
    from moegate.choice.tables import Row
    from moegate.measure.tune import Measure, Tuning


def tune(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Further names of `moegate models`, or folders with a config.json, whose own times plans are to know.",
            metavar="[SOURCE ...]",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Another file than the one in the cache folder, which gates read.", metavar="FILE"),
    ] = None,
) -> None:
    """Measure this GPU: the cost table by which plans choose, and which `moegate explain` cites.

    Measures a sample of the catalog, in CUDA graphs behind another kernel; times of other shapes are inferred from it.
    The measurement needs a few minutes and can be stopped at any time (Ctrl-C, kill); the same command resumes. Exit
    status: 130 if stopped, 2 without a GPU.
    """
    need_gpu("moegate tune")
    with errors_in_one_line():
        from moegate.choice.tables import user_file
        from moegate.cli.inputs import check_reads_not, load_spec
        from moegate.measure.session import Session
        from moegate.measure.tune import WAY, Tuning, made_by

        more = dict(load_spec(source) for source in sources or [])
        if out is not None:
            check_reads_not(out, more)
        session = Session()
        machine = session.machine
        command = shlex.join(["moegate", "tune", *(sources or []), *([] if out is None else ["--out", str(out)])])
        path = out or user_file(machine.name)
        path.parent.mkdir(parents=True, exist_ok=True)  # reports a folder that cannot be made before measuring
        check_out("--out" if out else "the cache folder", path)
        tuning = Tuning(Path(os.path.realpath(path)), machine, made_by(command), more)
    run(tuning, lambda spec, tokens: session.measure(spec, tokens, WAY))


def run(tuning: Tuning, measure: Measure) -> None:
    """Measures the missing cases with a progress bar; after an interrupt, prints how to resume."""
    import torch

    every, missing = tuning.cases(), tuning.missing()
    out = console(stderr=True)
    if len(missing) < len(every):
        out.print(
            f"going on after {len(every) - len(missing)} of {len(every)} rows in {tuning.partial}", soft_wrap=True
        )
    with progress_bar() as bar:
        task = bar.add_task("compiling", total=len(every), completed=len(every) - len(missing))
        try:
            with torch.no_grad():
                for row in tuning.run(measure):
                    bar.update(task, advance=1, description=f"{row.model} M={row.tokens}")
                    if bar.disable:
                        out.print(_line(row), soft_wrap=True)
        except KeyboardInterrupt:
            left = len(tuning.missing())
            complain(f"stopped with {len(every) - left} of {len(every)} rows measured; the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            fail(f"cannot write {tuning.path}: {error}")
    out.print(f"written   {tuning.path}", soft_wrap=True)


def _line(row: Row) -> str:
    """A row as one line of a log."""
    times = ", ".join(f"{key} {us:.2f}" for key, us in row.us.items())
    return f"{row.model} M={row.tokens}: {times}"
