"""The report of `moegate route` on a routing."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from moegate.cli.inputs import Job
from moegate.cli.machine import device_name
from moegate.cli.models import describe
from moegate.cli.output import new_table
from moegate.contract.verify import Verdict, verify_call
from moegate.measure.wall_clock import Timing, time_call
from moegate.routing import Routing
from moegate.spec import RouterSpec

_TOKENS_SHOWN = 4
_NAME_WIDTH, _PAIR_WIDTH = 14, 16  # of the columns in the table of tokens
_LEVELS = "▁▂▃▄▅▆▇█"
_PER_LINE = (64, 32, 16)  # bars a line; the largest number that fits the console
_ID_WIDTH = 10


@dataclass(frozen=True)
class Summary:
    """The results of a run."""

    job: Job
    routing: Routing
    backend: str
    device: str
    load: Tensor
    """[E] int64: the number of tokens of each selectable id, without NaN tokens."""
    nan_tokens: int
    """The number of tokens with a NaN weight, whose ids mean nothing."""
    comparison: Verdict
    timing: Timing

    def as_dict(self) -> dict[str, Any]:
        """The content of --json: everything, except that ids and weights are of the first tokens only."""
        spec = self.job.gate.spec
        outputs = {name: each for name, each in self.routing._asdict().items() if each is not None and name != "logits"}
        load = self.load.tolist()
        return {
            "source": self.job.title,
            "origin": self.job.origin,
            "spec": dataclasses.asdict(spec),
            "tokens": len(self.job.hidden),
            "hidden_dtype": _short(self.job.hidden),
            "weight_dtype": _short(self.job.weight),
            "backend": self.backend,
            "device": {"type": str(self.job.hidden.device), "name": self.device},
            "first_tokens": {name: each[:_TOKENS_SHOWN].tolist() for name, each in outputs.items()},
            "nan_tokens": self.nan_tokens,
            "load": {"experts": load[: spec.num_experts], "zero_experts": load[spec.num_experts :]},
            "logits": {
                "dtype": spec.logits_dtype,
                "max_error": self.comparison.max_error,
                "share_of_bound": self.comparison.share_of_bound,
            },
            "contract": {
                "ok": self.comparison.ok,
                "rows": self.comparison.rows,
                "excused_rows": self.comparison.excused_rows,
                "problems": self.comparison.problems,
            },
            "time": dataclasses.asdict(self.timing),
        }


def summarise(job: Job, routing: Routing) -> Summary:
    """Checks and times a routing."""
    spec, device = job.gate.spec, job.weight.device
    with torch.no_grad():
        comparison = verify_call(routing, job.hidden, job.weight, spec, job.tensors, job.input_ids)
    is_nan = routing.topk_weights.isnan().any(dim=-1)
    in_range = routing.topk_ids[~is_nan].flatten().long().cpu()
    in_range = in_range[(in_range >= 0) & (in_range < spec.num_selectable)]  # a broken backend returns others
    load = torch.bincount(in_range, minlength=spec.num_selectable)
    timing = time_call(lambda: job.gate(job.hidden, input_ids=job.input_ids), device)
    backend, nan_tokens = job.gate.explain(len(job.hidden)).backend, int(is_nan.sum())
    return Summary(job, routing, backend, device_name(device), load, nan_tokens, comparison, timing)


def print_report(summary: Summary, out: Console) -> None:
    """Prints the summary as text."""
    _print_head(summary, out)
    _print_tokens(summary, out)
    _print_load(summary, out)
    comparison, timing = summary.comparison, summary.timing
    share = f"{comparison.share_of_bound:.{2 if comparison.share_of_bound < 0.1 else 0}%}"
    rounded = " (bfloat16)" if summary.job.gate.spec.logits_dtype == "bfloat16" else ""
    out.print(f"logits    off float64 by {comparison.max_error:.2g}{rounded}, {share} of the contract's bound")
    kept = Text("kept", style="green") if comparison.ok else Text("BROKEN", style="bold red")
    tokens = "1 token" if comparison.rows == 1 else f"{comparison.rows} tokens"
    rows = f" for {tokens}, {comparison.excused_rows} excused as near-ties"
    out.print(Text("contract  ").append(kept).append(rows if comparison.ok else ""))
    for problem in comparison.problems:
        out.print(f"          {problem}", soft_wrap=True)
    shown = f"{timing.median_us:.1f} µs a call"
    if timing.graph_us is not None:
        shown = f"{timing.graph_us:.1f} µs a call in a CUDA graph, {timing.median_us:.1f} µs from Python"
    out.print(f"time      {shown} (median of {timing.repeats}) on {summary.device}", soft_wrap=True)


def _print_head(summary: Summary, out: Console) -> None:
    job, spec = summary.job, summary.job.gate.spec
    extra = f" + {spec.num_zero_experts} zero" if spec.num_zero_experts else ""
    extra += f" + {spec.num_shared_gates} shared" if spec.num_shared_gates else ""
    shape = f"{len(job.hidden)} x {spec.hidden_size} → {spec.num_experts}{extra} experts, top {spec.top_k}"
    out.print(Text(job.title, style="bold cyan").append(f"  {shape}", style="not bold default"), soft_wrap=True)
    out.print(f"router    {describe(spec)}", soft_wrap=True)
    out.print(f"inputs    {job.origin}", soft_wrap=True)
    dtypes = f"{_short(job.hidden)} x {_short(job.weight)} → {spec.logits_dtype} logits"
    out.print(f"backend   {summary.backend}, {dtypes}")
    out.print(f"device    {job.hidden.device}, {summary.device}", soft_wrap=True)
    out.print()


def _print_tokens(summary: Summary, out: Console) -> None:
    routing, spec = summary.routing, summary.job.gate.spec
    table = new_table()
    table.add_column("expert, weight")
    room = max(1, (out.width - _NAME_WIDTH) // _PAIR_WIDTH)
    shown = min(_TOKENS_SHOWN, room, len(routing.topk_ids))
    for token in range(shown):
        table.add_column(f"token {token}", justify="right", no_wrap=True)
    ids, weights = routing.topk_ids[:shown].tolist(), routing.topk_weights[:shown].tolist()
    for rank in range(routing.topk_ids.shape[1]):
        cells = (_pair(ids[token][rank], weights[token][rank], spec) for token in range(shown))
        table.add_row(f"choice {rank + 1}", *cells)
    if routing.shared_weights is not None:
        for gate, values in enumerate(routing.shared_weights[:shown].T.tolist()):
            table.add_row(f"shared gate {gate}", *(f"{value:.4f}" for value in values), style="dim")
    if routing.identity_weight is not None:
        masses = routing.identity_weight[:shown].tolist()
        table.add_row("identity", *(f"{value:.4f}" for value in masses), style="dim")
    if shown:
        out.print(table)
        out.print()


def _pair(expert: int, weight: float, spec: RouterSpec) -> str:
    return f"{expert}{'z' if expert >= spec.num_experts else ''}  {weight:.4f}"


def _print_load(summary: Summary, out: Console) -> None:
    spec = summary.job.gate.spec
    load = summary.load.tolist()
    if summary.nan_tokens:
        verb = "is" if summary.nan_tokens == 1 else "are"
        nan = f"{summary.nan_tokens} of {len(summary.routing.topk_ids)} tokens {verb} NaN, which the load leaves out"
        out.print(Text("nan       ").append(nan, style="bold red"))
    _print_loads("load", "experts", load[: spec.num_experts], 0, max(load), out)
    if spec.num_zero_experts:
        _print_loads("zero", "zero experts", load[spec.num_experts :], spec.num_experts, max(load), out)
    if spec.num_shared_gates:
        gates = "1 gate takes" if spec.num_shared_gates == 1 else f"{spec.num_shared_gates} gates take"
        out.print(f"shared    {gates} every token")
    out.print()


def _print_loads(label: str, what: str, load: list[int], first_id: int, highest: int, out: Console) -> None:
    """Prints bars of eight levels up to the highest load, a dot for no load, behind the first id of each line."""
    busiest = max(range(len(load)), key=load.__getitem__)
    who = f" (id {first_id + busiest})" if load[busiest] else ""
    spread = f"min {min(load)}, mean {sum(load) / len(load):.1f}, max {load[busiest]} tokens{who}"
    out.print(f"{label:<10}{spread}; {load.count(0)} of {len(load)} {what} idle")
    per_line = next((bars for bars in _PER_LINE if bars + _ID_WIDTH <= out.width), _PER_LINE[-1])
    width = max(1, min(4, per_line // len(load)))  # a few experts get wide bars
    for start in range(0, len(load), per_line):
        line = load[start : start + per_line]
        bars = "".join(_bar(value, highest) * width + (" " if width > 1 else "") for value in line)
        out.print(Text(f"{first_id + start:>8}  ").append(bars.rstrip(), style="cyan"), soft_wrap=True)


def _bar(value: int, highest: int) -> str:
    return _LEVELS[(value * len(_LEVELS) - 1) // highest] if value else "·"


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
