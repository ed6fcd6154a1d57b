"""`moegate bench`: moegate and its peers on this GPU, as a table, JSON and a page with plots."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from moegate.cli.explain import numbers
from moegate.cli.output import check_out, complain, console, errors_in_one_line, fail, new_table, print_json
from moegate.cli.progress import INTERRUPTED, need_gpu, progress_bar
from moegate.json_file import read_json
from moegate.whole_file import replacing

if TYPE_CHECKING:
    from rich.table import Table

    from moegate.measure.bench import Case, Source
    from moegate.measure.record import Record

_NAME_WIDTH, _TIME_WIDTH, _EXPERTS_WIDTH = 20, 8, 12  # least widths of a table's columns, including padding


def bench(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names of `moegate models`, or folders with a config.json; four models unless given.",
            metavar="[SOURCE ...]",
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens; 1 to 4096 in steps unless given.", metavar="M,M,...")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for bench.json and bench.html; what it holds is not measured anew.", metavar="DIR"),
    ] = None,
    render: Annotated[
        Path | None,
        typer.Option(
            "--render", help="Measure nothing: print the tables of DIR/bench.json and make its page.", metavar="DIR"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of the table.")] = False,
) -> None:
    """Measure moegate and its installed peers on this GPU: cold, hot, and in a chain behind another kernel.

    Every result is compared with float64, and a wrong result has no time. The command can be stopped at any time; with
    --out the same command resumes. Exit status: 130 if stopped, 2 without a GPU, or without plotly for --render.
    """
    if render is not None:
        if sources or tokens or out is not None:
            fail("--render: allowed without sources, --tokens and --out, since nothing is measured")
        with errors_in_one_line():
            content = _read(render)
            if not _write_page(render, content):
                raise typer.Exit(2)
    else:
        need_gpu("moegate bench")
        content = _measured(sources or [], tokens, out)
        if out is not None:
            with errors_in_one_line():
                _write_page(out, content)
    if as_json:
        print_json(content)
    else:
        _print(content, console())


def _measured(names: list[str], tokens: str | None, out: Path | None) -> dict[str, Any]:
    import tempfile

    with errors_in_one_line():
        from moegate.measure import bench as cases
        from moegate.measure.record import describe_run

        chosen = [_source(name) for name in names or cases.SOURCES]
        counts = list(cases.TOKENS) if tokens is None else numbers("--tokens", tokens)
        if 0 in counts:
            raise ValueError("--tokens: got 0; allowed: 1 or more")
        if out is not None:
            _check_folder(out)
    command = shlex.join(["moegate", *("DIR" if word == str(out) else word for word in sys.argv[1:])])
    run = describe_run(command)
    with tempfile.TemporaryDirectory() as scratch:
        with errors_in_one_line():
            record = cases.record_in(out or Path(scratch), run)
        todo = [
            case for case in cases.cases(chosen, counts, cases.WAYS) if not record.has(case[0].title, case[1], case[2])
        ]
        _run(record, todo)
    return {"runs": record.runs, "rows": record.rows}


def _run(record: Record, todo: list[Case]) -> None:
    import torch

    from moegate.measure.bench import measure_case
    from moegate.measure.session import Session

    session, out = Session(), console(stderr=True)
    with progress_bar() as bar, torch.no_grad():
        task = bar.add_task("compiling", total=len(todo))
        try:
            for done, (source, count, way) in enumerate(todo):
                record.add(source.title, count, way, measure_case(session, source, count, way))
                what = f"{source.title} M={count} {way}"
                bar.update(task, advance=1, description=what)
                if bar.disable:
                    out.print(f"{done + 1} of {len(todo)}: {what}", soft_wrap=True)
        except KeyboardInterrupt:
            complain("stopped; with --out the same command goes on")
            raise typer.Exit(INTERRUPTED) from None
        except OSError as error:
            fail(f"cannot write {record.path}: {error}")


def _check_folder(out: Path) -> None:
    """Makes the folder of --out, and reports what cannot be written before anything is measured."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out: {out} is a file; allowed: a folder")
    out.mkdir(parents=True, exist_ok=True)
    for name in ("bench.json", "bench.html"):
        check_out("--out", out / name)


def _source(name: str) -> Source:
    from moegate import catalog
    from moegate.cli.inputs import load_spec
    from moegate.configs.routing_part import routing_config
    from moegate.measure.bench import Source

    title, spec = load_spec(name)
    if title in catalog.names():
        return Source(title, spec, catalog.get_model(title).config)
    return Source(Path(title).resolve().name, spec, routing_config(title)[0])


def _read(folder: Path) -> dict[str, Any]:
    from moegate.measure.names import check_words

    file = folder / "bench.json"
    content: dict[str, Any] = read_json(file, "--render:")
    try:
        rows = content["rows"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"--render: {file} is not what `moegate bench --out` writes: {error}") from None
    if not rows:
        raise ValueError(f"--render: {file} has no rows")
    check_words(file, rows)
    return content


def _write_page(folder: Path, content: dict[str, Any]) -> bool:
    """Writes the page; without plotly, prints one line about it and returns False."""
    try:
        from moegate.report.page import page
    except ImportError:
        complain(
            f"no {folder / 'bench.html'}: plotly is missing; after `pip install moegate[bench]`, here or elsewhere, "
            f"`moegate bench --render {folder}` makes it"
        )
        return False
    check_out("--out", folder / "bench.html")
    text = page(content)
    with replacing(folder / "bench.html") as new:
        new.write_text(text, encoding="utf-8")
    complain(f"written {folder / 'bench.html'}")
    return True


def _print(content: dict[str, Any], out: Console) -> None:
    """Prints tables for each model and way, each as wide as the console."""
    from moegate.report.numbers import WAYS, columns, origins, verdicts

    for line in origins(content["runs"]):
        out.print(line, soft_wrap=True)
    out.print()
    at_once = max(2, (out.width - _NAME_WIDTH - _EXPERTS_WIDTH) // _TIME_WIDTH)
    for model, way, rows in columns(content["rows"]):
        out.print(Text(model, style="bold cyan").append(f"  {WAYS[way]}", style="not bold default"))
        for first in range(0, len(rows), at_once):
            out.print(_table(rows[first : first + at_once]))
            out.print()
    for line in verdicts(content["rows"]):
        out.print(line, soft_wrap=True)


def _table(rows: list[dict[str, Any]]) -> Table:
    """Contestants down, numbers of tokens across."""
    from moegate.report.numbers import agreement, cell, label

    table = new_table()
    table.add_column("contestant, µs a call", overflow="fold")
    for row in rows:
        table.add_column(f"M={row['tokens']}", justify="right", no_wrap=True)
    table.add_column("same experts", justify="right", width=_EXPERTS_WIDTH)
    for name in dict.fromkeys(name for row in rows for name in row["contestants"]):
        found = [row["contestants"].get(name, {}) for row in rows]
        cells = [cell(each) for each in found]
        if set(cells) != {""}:
            table.add_row(label(name), *cells, agreement(found))
    return table
