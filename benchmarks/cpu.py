"""`Gate` against Transformers' own routers on the CPU, eager, in one run: `python benchmarks/cpu.py`.

Blocks of calls of each contestant take turns, so that a busy machine slows all of them equally. A time is the median
over the blocks. A contestant is timed only after its routing has been compared with float64. Prints a Markdown table;
`--csv FILE` writes the numbers, which git keeps in benchmarks/results/cpu.csv.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from torch import Tensor

import moegate
from moegate import Gate
from moegate.arguments import check_gate
from moegate.cli.machine import cpu_name
from moegate.contract.verify import verify_call
from moegate.measure.record import describe_run
from moegate.routing import RouterTensors
from moegate.synthetic import random_hidden, random_tensors

# By catalog name: Transformers' module, its router class, and what its default config lacks of the model.
PEERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "deepseek-v3": ("deepseek_v3", "DeepseekV3TopkRouter", {}),
    "qwen3-30b-a3b": ("qwen3_moe", "Qwen3MoeTopKRouter", {"norm_topk_prob": True}),
    "gpt-oss-120b": ("gpt_oss", "GptOssTopKRouter", {"num_local_experts": 128}),
}
TOKENS = (1, 8, 64, 512)
BLOCKS, BLOCK_SECONDS = 25, 0.02


@dataclass
class Row:
    """Median microseconds of a call."""

    model: str
    threads: int
    tokens: int
    transformers_us: float
    gate_us: float
    frozen_gate_us: float


def peer(name: str, weight: Tensor, tensors: RouterTensors) -> torch.nn.Module:
    """Transformers' router of a model, with the given weight and biases."""
    module, class_name, changed = PEERS[name]
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    config = transformers.AutoConfig.for_model(module, **changed)
    router: torch.nn.Module = getattr(modeling, class_name)(config).to(weight.dtype)
    router.weight = torch.nn.Parameter(weight, requires_grad=False)
    if tensors.bias is not None:
        router.bias = torch.nn.Parameter(tensors.bias, requires_grad=False)
    if tensors.e_score_correction_bias is not None:
        router.e_score_correction_bias = tensors.e_score_correction_bias
    return router.eval()


def hold_against_float64(gate: Gate, hidden: Tensor) -> None:
    """Ends the benchmark if the gate's result is wrong."""
    routing = gate(hidden, return_logits=True)
    weight, tensors = check_gate(gate._given(), gate.spec)
    problems = verify_call(routing, hidden, weight, gate.spec, tensors).problems
    if problems:
        raise SystemExit(f"wrong result: {problems}")


def block_medians(calls: list[Callable[[], object]]) -> list[float]:
    """The median over blocks of the mean time of a call, in microseconds."""
    repeats = []
    for call in calls:
        call()
        repeats.append(max(1, int(BLOCK_SECONDS / seconds_of(call, 1))))
    times = [[seconds_of(call, n) for call, n in zip(calls, repeats, strict=True)] for _ in range(BLOCKS)]
    return [statistics.median(column) * 1e6 for column in zip(*times, strict=True)]


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def rows(thread_counts: list[int]) -> Iterator[Row]:
    cases = [(n, name, m) for n in thread_counts for name in PEERS for m in TOKENS]
    for threads, name, tokens in track(cases, "benchmark"):
        torch.set_num_threads(threads)
        spec = moegate.get_spec(name)
        weight, tensors = random_tensors(spec)
        given = {key: value for key, value in tensors._asdict().items() if value is not None}
        gates = [Gate(spec, weight, **given, frozen=frozen) for frozen in (False, True)]
        hidden = random_hidden(spec, tokens)
        for gate in gates:
            hold_against_float64(gate, hidden)
        router = peer(name, weight, tensors)
        calls: list[Callable[[], object]] = [lambda c=c, h=hidden: c(h) for c in (router, *gates)]  # type: ignore[misc]
        yield Row(name, threads, tokens, *block_medians(calls))


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="also write the numbers to this file")
    arguments = parser.parse_args()
    run = describe_run("python benchmarks/cpu.py")
    machine = {"cpu": cpu_name(), "cores": torch.get_num_threads()}
    machine |= {name: run[name] for name in ("python", "torch", "transformers", "moegate")}
    with torch.inference_mode():
        results = list(rows(sorted({1, torch.get_num_threads()})))
    print(
        f"\n{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, moegate {machine['moegate']}\n"
    )
    print("| model | threads | tokens | Transformers, µs | Gate, µs | ratio | Gate frozen, µs | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for row in results:
        ratios = [row.transformers_us / row.gate_us, row.transformers_us / row.frozen_gate_us]
        print(
            f"| {row.model} | {row.threads} | {row.tokens} | {row.transformers_us:.0f} | {row.gate_us:.0f} | "
            f"{ratios[0]:.2f} | {row.frozen_gate_us:.0f} | **{ratios[1]:.2f}** |"
        )
    if arguments.csv:
        write(arguments.csv, results, {**machine, "commit": run["moegate_commit"], "date": run["date"][:10]})


def write(file: Path, results: list[Row], machine: dict[str, Any]) -> None:
    """Writes one line a row, each with the machine, the versions, the commit and the date."""
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*(field.name for field in fields(Row)), *machine])
        for row in results:
            case, times = astuple(row)[:3], astuple(row)[3:]
            writer.writerow([*case, *(f"{time:.2f}" for time in times), *machine.values()])


if __name__ == "__main__":
    main()
