"""`moegate route` for several layers of a checkpoint: a row for each layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moegate._version import __version__
from moegate.catalog.layer_names import ranges
from moegate.cli.inputs import Jobs
from moegate.cli.models import describe
from moegate.cli.output import complain, console, new_table, print_json
from moegate.cli.progress import progress_bar
from moegate.cli.route_report import Summary, summarise
from moegate.spec import RouterSpec
from moegate.whole_file import replacing

_ANY_WIDTH = 1000  # of a console that is wider than any table


def route_layers(jobs: Jobs, out: Path | None, as_json: bool) -> None:
    """Routes, checks and reports all layers; exit status 1 if one breaks the contract."""
    facts: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for summary in _summaries(jobs):
        facts.append({"layer": summary.job.layer} | summary.as_dict() | {"out": None if out is None else str(out)})
        if out is not None:
            tensors |= _by_layer(summary)
    if out is not None:
        _write(out, tensors, jobs.title, facts)
    if as_json:
        print_json(facts)
    else:
        _print(jobs.title, facts, console())
        if out is not None:
            console().print(f"written   {out}", soft_wrap=True)
    broken = [fact["layer"] for fact in facts if not fact["contract"]["ok"]]
    if broken:
        problems = next(fact["contract"]["problems"] for fact in facts if not fact["contract"]["ok"])
        complain(f"the contract is broken in layers {ranges(broken)}; {broken[0]}: {'; '.join(problems)}")
        raise typer.Exit(1)


def _summaries(jobs: Jobs) -> Iterator[Summary]:
    """The summary of each layer, with a progress bar, or a line for each layer if there is no terminal."""
    with progress_bar(first=None) as bar:
        task = bar.add_task("routing", total=len(jobs.layers))
        for job in jobs:
            routing = job.gate(job.hidden, input_ids=job.input_ids, return_logits=True)
            summary = summarise(job, routing)
            bar.update(task, advance=1, description=f"layer {job.layer}")
            if bar.disable:
                console(stderr=True).print(_progress(summary), style="dim", soft_wrap=True)
            yield summary


def _progress(summary: Summary) -> str:
    nan = f", {summary.nan_tokens} of {len(summary.routing.topk_ids)} tokens are NaN" if summary.nan_tokens else ""
    return f"layer {summary.job.layer}: {_verdict(summary.comparison.ok)}{nan}"


def _by_layer(summary: Summary) -> dict[str, Tensor]:
    """The tensors to write for a layer, by name: "layers.3.topk_ids" and so on."""
    tensors = summary.routing._asdict().items()
    return {f"layers.{summary.job.layer}.{name}": each.contiguous() for name, each in tensors if each is not None}


def _write(out: Path, tensors: dict[str, Tensor], source: str, facts: list[dict[str, Any]]) -> None:
    specs = json.dumps({fact["layer"]: fact["spec"] for fact in facts})
    try:
        with replacing(out) as new:
            save_file(tensors, new, metadata={"specs": specs, "source": source, "moegate": __version__})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--out: cannot write {out}: {error}") from None


def _print(title: str, facts: Sequence[dict[str, Any]], out: Console) -> None:
    """Prints what the layers have in common, then the rows."""
    first = facts[0]
    layers = f"  layers {ranges([fact['layer'] for fact in facts])}, {first['tokens']} tokens"
    out.print(Text(title, style="bold cyan").append(layers, style="not bold default"))
    for router, where in _routers(facts).items():
        which = f" (layers {ranges(where)})" if len(where) < len(facts) else ""
        out.print(f"router    {router}{which}")
    out.print(f"inputs    {first['origin']}")
    out.print(f"device    {first['device']['type']}, {first['device']['name']}")
    out.print()
    table = _table(facts)
    if Measurement.get(out, out.options.update(max_width=_ANY_WIDTH), table).maximum <= out.width:
        out.print(table)
    else:
        for fact in facts:
            out.print(_lines(fact))
    out.print()
    nan = "; NaN: tokens whose weights are NaN, which the load leaves out" if _has_nan(facts) else ""
    out.print(f"tokens of an expert: least, mean, most; excused: rows that differ as near-ties{nan}")


def _has_nan(facts: Sequence[dict[str, Any]]) -> bool:
    return any(fact["nan_tokens"] for fact in facts)


def _table(facts: Sequence[dict[str, Any]]) -> Table:
    """A row a layer; a column of NaN tokens if any layer has NaN tokens."""
    names = list(_cells(facts[0]))
    if not _has_nan(facts):
        names.remove("NaN")
    table = new_table()
    for name in names:
        table.add_column(name, justify="left" if name == "contract" else "right", no_wrap=True)
    for fact in facts:
        cells = _cells(fact) | {"contract": _styled(fact["contract"]["ok"])}
        table.add_row(*(cells[name] for name in names))
    return table


def _lines(fact: dict[str, Any]) -> Text:
    """A row as one line of text, for a console that is too narrow for the table."""
    cells = _cells(fact)
    nan = f"NaN {cells['NaN']}, " if fact["nan_tokens"] else ""
    numbers = ", ".join(f"{name} {cells[name]}" for name in ("least", "mean", "most", "idle"))
    line = Text(f"layer {cells['layer']}: ").append_text(_styled(fact["contract"]["ok"]))
    line.append(f", excused {cells['excused']}, {nan}{numbers}, ")
    return line.append(f"{cells['of bound']} of bound, {cells['µs a call']} µs a call")


def _routers(facts: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """The layers of each router, by the router's description."""
    found: dict[str, list[int]] = {}
    for fact in facts:
        spec = RouterSpec(**fact["spec"])
        size = f"{spec.hidden_size} → {spec.num_experts} experts, top {spec.top_k}"
        found.setdefault(f"{describe(spec)}, {size}, {spec.logits_dtype} logits", []).append(fact["layer"])
    return found


def _cells(fact: dict[str, Any]) -> dict[str, str]:
    """The cells of a row, by column name."""
    load = fact["load"]["experts"] + fact["load"]["zero_experts"]
    return {
        "layer": f"{fact['layer']}",
        "contract": _verdict(fact["contract"]["ok"]),
        "excused": f"{fact['contract']['excused_rows']}",
        "NaN": f"{fact['nan_tokens']}",
        "least": f"{min(load)}",
        "mean": f"{sum(load) / len(load):.1f}",
        "most": f"{max(load)}",
        "idle": f"{load.count(0)}",
        "of bound": f"{fact['logits']['share_of_bound']:.2%}",
        "µs a call": f"{fact['time']['median_us']:.1f}",
    }


def _styled(ok: bool) -> Text:
    return Text(_verdict(ok), style="green" if ok else "bold red")


def _verdict(ok: bool) -> str:
    return "kept" if ok else "BROKEN"
