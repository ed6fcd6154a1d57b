"""`moegate engines`: which engines are here, and what moegate would route in them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from moegate.cli.output import console, errors_in_one_line, new_table, print_json
from moegate.integrations.engines import ENGINES, TRANSFORMERS, Engine


def engines(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT", help="Also say what moegate would route of the checkpoint there."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects, one an engine.")] = False,
) -> None:
    """Say which inference engines are installed, in which versions, and what moegate would take over."""
    with errors_in_one_line():
        rows = [_row(engine, checkpoint) for engine in ENGINES]
    if as_json:
        print_json(rows)
        return
    table = new_table()
    for title in ("engine", "installed", "from, to", "switch", *(["would route"] if checkpoint else [])):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(str(row[key] or "-") for key in row if key != "left"))
    console().print(table)
    for row in rows:
        for reason, count in Counter(row.get("left", {}).values()).most_common():
            console().print(f"{row['engine']}: {count} left: {reason}")


def _row(engine: Engine, checkpoint: Path | None) -> dict[str, Any]:
    switch = "patch(model)" if engine is TRANSFORMERS else "MOEGATE=1"
    row: dict[str, Any] = {
        "engine": engine.name,
        "installed": engine.installed(),
        "range": engine.range,
        "switch": switch,
    }
    if checkpoint is None:
        return row
    if engine is TRANSFORMERS and (reason := engine.why_not()) is not None:
        return row | {"routes": reason, "left": {}}
    from moegate.integrations.forecast import forecast  # PyTorch is imported only where a checkpoint is read

    found = forecast(engine, checkpoint)
    layers = f"{len(found.taken)} of {len(found.taken) + len(found.left)} MoE layers"
    return row | {"routes": layers, "left": found.left}
