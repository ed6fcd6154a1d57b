"""What `moegate route` does with several layers of a checkpoint: a row for each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moegate import __version__
from moegate.catalog.layer_names import ranges
from moegate.cli.inputs import Jobs
from moegate.cli.models import describe
from moegate.cli.output import complain, console, new_table, print_json
from moegate.cli.progress import progress_bar
from moegate.cli.route_report import Summary, summarise
from moegate.spec import RouterSpec
from moegate.whole_file import replacing


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
    """The summary of each layer, with a bar, or a line for each where there is no terminal."""
    with progress_bar(first=None) as bar:
        task = bar.add_task("routing", total=len(jobs.layers))
        for job in jobs:
            routing = job.gate(job.hidden, input_ids=job.input_ids, return_logits=True)
            summary = summarise(job, routing)
            bar.update(task, advance=1, description=f"layer {job.layer}")
            if bar.disable:
                console(stderr=True).print(f"layer {job.layer}: {_verdict(summary.comparison.ok)}", style="dim")
            yield summary


def _by_layer(summary: Summary) -> dict[str, Tensor]:
    """What is written of a layer: "layers.3.topk_ids" and so on."""
    parts = summary.routing._asdict().items()
    return {f"layers.{summary.job.layer}.{name}": part.contiguous() for name, part in parts if part is not None}


def _write(out: Path, tensors: dict[str, Tensor], source: str, facts: list[dict[str, Any]]) -> None:
    specs = json.dumps({fact["layer"]: fact["spec"] for fact in facts})
    try:
        with replacing(out) as new:
            save_file(tensors, new, metadata={"specs": specs, "source": source, "moegate": __version__})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"--out: cannot write {out}: {error}") from None


def _print(title: str, facts: Sequence[dict[str, Any]], out: Console) -> None:
    """The rows, under what they have in common."""
    first = facts[0]
    layers = f"  layers {ranges([fact['layer'] for fact in facts])}, {first['tokens']} tokens"
    out.print(Text(title, style="bold cyan").append(layers, style="not bold default"), soft_wrap=True)
    for router, where in _routers(facts).items():
        which = f" (layers {ranges(where)})" if len(where) < len(facts) else ""
        out.print(f"router    {router}{which}", soft_wrap=True)
    out.print(f"inputs    {first['origin']}", soft_wrap=True)
    out.print(f"device    {first['device']['type']}, {first['device']['name']}", soft_wrap=True)
    out.print()
    table = new_table()
    for name in ("layer", "contract", "excused", "least", "mean", "most", "idle", "of bound", "µs a call"):
        table.add_column(name, justify="left" if name == "contract" else "right", no_wrap=True)
    for fact in facts:
        table.add_row(*_row(fact))
    out.print(table)
    out.print()
    out.print("tokens of an expert: least, mean, most; excused: rows that differ as near-ties", soft_wrap=True)


def _routers(facts: Sequence[dict[str, Any]]) -> dict[str, list[int]]:
    """The layers of each router, by what the router is."""
    found: dict[str, list[int]] = {}
    for fact in facts:
        spec = RouterSpec(**fact["spec"])
        size = f"{spec.hidden_size} → {spec.num_experts} experts, top {spec.top_k}"
        found.setdefault(f"{describe(spec)}, {size}, {spec.logits_dtype} logits", []).append(fact["layer"])
    return found


def _row(fact: dict[str, Any]) -> list[Text | str]:
    load = fact["load"]["experts"] + fact["load"]["zero_experts"]
    contract = fact["contract"]
    verdict = Text(_verdict(contract["ok"]), style="green" if contract["ok"] else "bold red")
    spread = [f"{min(load)}", f"{sum(load) / len(load):.1f}", f"{max(load)}", f"{load.count(0)}"]
    share, time = f"{fact['logits']['share_of_bound']:.2%}", f"{fact['time']['median_us']:.1f}"
    return [f"{fact['layer']}", verdict, f"{contract['excused_rows']}", *spread, share, time]


def _verdict(ok: bool) -> str:
    return "kept" if ok else "BROKEN"
