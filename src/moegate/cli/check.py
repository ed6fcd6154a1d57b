"""`moegate check`: the machine, and every backend on it checked against the contract."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.text import Text

from moegate import catalog
from moegate.cli.output import complain, console, new_table, print_json

if TYPE_CHECKING:
    import torch

    from moegate.contract.verify import Verdict
    from moegate.spec import RouterSpec

# Together they use every field of a spec that the catalog uses.
MODELS = (
    "deepseek-v3",
    "deepseek-v2",
    "deepseek-v4-flash",
    "deepseek-v4-flash-hash",
    "qwen3-30b-a3b",
    "gpt-oss-120b",
    "llama-4-scout",
    "kolibri-1",
    "muse-spark-open-816b",
    "gemma-4-26b-a4b",
    "ernie-4.5-21b-a3b",
    "longcat-flash",
    "inkling",
)
TOKENS = (1, 17, 256)
_NARROW = 60  # columns of a console; below, a table has no room for names


def check(as_json: Annotated[bool, typer.Option("--json", help="Print one object.")] = False) -> None:
    """Show this machine, and compare every backend with float64 on routers of the catalog.

    Weights and hidden states are random, in the models' real sizes. Exit status: 1 if a check failed.
    """
    from moegate.choice.candidates import BACKENDS
    from moegate.cli.machine import describe_machine, devices

    machine = describe_machine()
    support = [
        {"backend": backend, "device": str(device), "reason": _why_not(backend, device)}
        for backend in BACKENDS
        for device in devices()
    ]
    runs = [
        (backend, device, name)
        for backend in BACKENDS
        for device in devices()
        if _why_not(backend, device) is None
        for name in MODELS
    ]
    progress = console(stderr=True)
    checks: list[dict[str, Any]] = []
    for run in track(runs, "checking", console=progress, transient=True, disable=not progress.is_terminal):
        checks += _check_model(*run)

    if as_json:
        rows = [{**row, "runs": row["reason"] is None} for row in support]
        print_json({"machine": machine, "backends": rows, "checks": checks})
    else:
        _print_machine(machine, support, console())
        _print_checks(checks, console())
    failed = sum(not check["ok"] for check in checks)
    if failed:
        complain(f"{failed} of {len(checks)} checks failed")
        raise typer.Exit(1)
    if not checks:
        complain("no backend runs here")
        raise typer.Exit(1)


def _why_not(backend: str, device: torch.device) -> str | None:
    """None, or why a backend does not run on a device."""
    from moegate.choice.candidates import CANDIDATES
    from moegate.choice.machines import machine_of
    from moegate.problem import default_weight_dtype, problem_of

    spec = catalog.get_spec(MODELS[0])
    problem = problem_of(machine_of(device), spec, default_weight_dtype(spec))
    return next(candidate for candidate in CANDIDATES if candidate.backend == backend).unsupported(problem, 1)


def _check_model(backend: str, device: torch.device, name: str) -> list[dict[str, Any]]:
    """One check for each number of tokens."""
    spec = catalog.get_spec(name)
    return [
        {"backend": backend, "device": str(device), "model": name, "tokens": tokens, "ok": found.ok}
        | dataclasses.asdict(found)
        for tokens in TOKENS
        for found in [_compare(backend, device, spec, tokens)]
    ]


def _compare(backend: str, device: torch.device, spec: RouterSpec, tokens: int) -> Verdict:
    from moegate.contract.verify import Verdict, verify_call
    from moegate.gate import Gate
    from moegate.synthetic import random_hidden, random_input_ids, random_tensors

    weight, tensors = random_tensors(spec, seed=0, device=device)
    hidden = random_hidden(spec, tokens, seed=tokens, device=device)
    input_ids = random_input_ids(tokens, seed=tokens, device=device) if spec.hash_routing else None
    try:
        gate = Gate(spec, weight, **tensors._asdict(), frozen=True, backend=backend)
        routing = gate(hidden, input_ids=input_ids, return_logits=True)
    except Exception as error:  # whatever a broken backend raises is reported
        message = " ".join(str(error).split())
        return Verdict(rows=tokens, problems=[f"{type(error).__name__}: {message}"])
    return verify_call(routing, hidden, weight, spec, tensors, input_ids)


def _print_machine(machine: dict[str, Any], support: list[dict[str, Any]], out: Console) -> None:
    cuda = f"ROCm {machine['hip']}" if machine["hip"] else "without CUDA"
    cuda = f"CUDA {machine['cuda']}" if machine["cuda"] else cuda
    out.print(f"python    {machine['python']}, {machine['system']}")
    out.print(f"torch     {machine['torch']}, {cuda}", soft_wrap=True)
    out.print(f"cpu       {machine['cpu']}, threads used: {machine['threads']}", soft_wrap=True)
    for index, gpu in enumerate(machine["gpus"]):
        capability = f"compute capability {gpu['compute_capability']}, " if machine["cuda"] else ""
        out.print(f"{f'cuda:{index}':<10}{gpu['name']}, {capability}{gpu['memory_gib']} GiB", soft_wrap=True)
    if machine["accelerator"]:
        out.print(f"gpu       {machine['accelerator']}, for --device, which is not checked here")
    elif not machine["gpus"]:
        out.print("gpu       none that PyTorch can use")
    for row in support:
        verdict = "runs" if row["reason"] is None else f"does not run: {row['reason']}"
        out.print(f"backend   {row['backend']} on {row['device']}: {verdict}", soft_wrap=True)
    out.print()


def _print_checks(checks: list[dict[str, Any]], out: Console) -> None:
    runs = {
        run: [row for row in checks if (row["backend"], row["device"], row["model"]) == run]
        for run in dict.fromkeys((row["backend"], row["device"], row["model"]) for row in checks)
    }
    if out.width < _NARROW:
        for (backend, device, model), rows in runs.items():
            out.print(Text(f"{backend} on {device}, {model}: ").append(Text(", ").join(map(_text, _named_cells(rows)))))
    else:
        _print_table(runs, out)
    out.print()
    _print_problems(checks, out)


def _named_cells(rows: list[dict[str, Any]]) -> list[str | Text]:
    """A router's checks, for one line of text."""
    error, share, excused, verdict = _cells(rows)
    return [verdict, f"logits off by {error}, {share} of bound", f"{excused} excused"]


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _print_table(runs: dict[tuple[str, str, str], list[dict[str, Any]]], out: Console) -> None:
    table = new_table()
    for name in ("backend", "device", "router"):
        table.add_column(name, overflow="fold")
    for name in ("logits off by", "of bound", "excused"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for run, rows in runs.items():
        table.add_row(*run, *_cells(rows))
    out.print(table)


def _print_problems(checks: list[dict[str, Any]], out: Console) -> None:
    for row in checks:
        for problem in row["problems"]:
            where = f"{row['backend']} on {row['device']}, {row['model']}, {row['tokens']} tokens"
            out.print(Text(f"{where}: {problem}", style="red"), soft_wrap=True)
    passed = sum(row["ok"] for row in checks)
    counts = ", ".join(map(str, TOKENS))
    summary = f"{passed} of {len(checks)} checks passed, for {counts} tokens"
    out.print(Text(summary, style="green" if passed == len(checks) else "bold red"))
    legend = (
        "Each router on so many random tokens, against float64. The worst logit, and its share of the error that "
        "the contract allows (bfloat16 logits: half an ulp and little more); rows with other experts than "
        "float64's, excused as near-ties."
    )
    out.print(Text(legend, style="dim"))


def _cells(rows: list[dict[str, Any]]) -> tuple[str | Text, ...]:
    """The worst of a router's checks."""
    error, share = (max(row[name] for row in rows) for name in ("max_error", "share_of_bound"))
    excused, tokens = (sum(row[name] for row in rows) for name in ("excused_rows", "rows"))
    ok = all(row["ok"] for row in rows)
    verdict = Text("ok", style="green") if ok else Text("FAILED", style="bold red")
    return f"{error:.1e}", f"{share:.1%}", f"{excused} of {tokens}", verdict
