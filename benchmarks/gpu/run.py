"""moegate on a CUDA GPU against its peers: `python benchmarks/gpu/run.py --out DIR`.

Every time is the median over replays of a CUDA graph of 58 calls or more; the contestants' graphs take turns. Every
call of a timed graph is compared with float64. Writes DIR/PART.json after each row; the same command resumes an
interrupted run. `report.py DIR` makes the page, `table.py DIR FILE.csv` the table of medians that git keeps.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # called by path, as the other benchmarks are

from benchmarks.gpu.host import measure_host, measure_start
from benchmarks.gpu.parts import Bench, Key, Options, keys
from moegate.measure.names import PREDECESSOR
from moegate.measure.record import Record, describe_run
from moegate.measure.timing import reason_of

GRAPH_PARTS = ("route", "gemm", "fp32", "select", "prefill", "catalog")
PARTS = (*GRAPH_PARTS[:-1], "host", "start", GRAPH_PARTS[-1])  # the longest last
_HOST_TOKENS = (1, 16)


def main() -> None:
    """Runs the benchmark."""
    arguments = _arguments(sys.argv[1:])
    console = Console(stderr=True, highlight=False)
    if not torch.cuda.is_available():
        console.print("PyTorch finds no CUDA device: nothing is measured")
        raise SystemExit(2)
    given = ["DIR" if argument == str(arguments.out) else argument for argument in sys.argv[1:]]
    run = describe_run(shlex.join(["python", "benchmarks/gpu/run.py", *given]))
    versions = f"torch {run['torch']}, FlashInfer {run['flashinfer']}, moegate {run['moegate_commit']}"
    console.print(f"{run['gpu']}, {versions}", markup=False)
    bench = Bench(Options(compile_catalog=arguments.compile))
    todo = {part: _missing(Record(arguments.out, part, run), part, arguments.models) for part in arguments.part}
    left, began, done = sum(len(cases) for cases in todo.values()), time.monotonic(), 0
    with torch.no_grad():
        for part, cases in todo.items():
            record = Record(arguments.out, part, run)
            for key in cases:
                if arguments.seconds is not None and time.monotonic() - began > arguments.seconds:
                    console.print(f"stopped by --seconds with {left - done} cases left; the same command goes on")
                    return
                content = _measured(part, key, bench, record)
                done += 1
                _tell(console, part, key, content, done, left, time.monotonic() - began)


def _arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the JSON files")
    parser.add_argument("--part", type=_parts, default=list(PARTS), help=f"of {','.join(PARTS)}; default: all")
    parser.add_argument("--models", type=_names, help="only these, by name; a shard of the catalog")
    parser.add_argument("--seconds", type=float, help="start no case later than this")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the catalog too (slow)")
    return parser.parse_args(words)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _parts(text: str) -> list[str]:
    names = _names(text)
    unknown = sorted(set(names) - set(PARTS))
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}; allowed: {', '.join(PARTS)}")
    return names


def cases_of(part: str) -> list[Key]:
    """All cases of a part."""
    if part == "host":
        return [("deepseek-v3", tokens, "host") for tokens in _HOST_TOKENS]
    if part == "start":
        return [("deepseek-v3", 1, way) for way in ("cold", "warm")]
    return keys(part)


def _missing(record: Record, part: str, models: list[str] | None) -> list[Key]:
    cases = cases_of(part)
    if models is not None:
        cases = [key for key in cases if key[0] in models]
    return [key for key in cases if not record.has(*key)]


def _measured(part: str, key: Key, bench: Bench, record: Record) -> dict[str, Any]:
    """Measures a case and records the result, or the error; ends the process if the GPU is lost."""
    work: Callable[[], dict[str, Any]]
    if part == "host":
        work = lambda: measure_host(key[0], key[1])  # noqa: E731
    elif part == "start":
        work = lambda: measure_start(key[2])  # noqa: E731
    else:
        work = lambda: bench.measure(part, key)  # noqa: E731
    began = time.monotonic()
    try:
        content = work()
    except Exception as error:  # the page lists the failure; the other cases are still measured
        content = {"failed": reason_of(error), "contestants": {}}
    content["seconds"] = round(time.monotonic() - began, 2)
    record.add(*key, content)
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise SystemExit(f"the GPU is lost after {part} {key}: {reason_of(error)}; the same command goes on") from None
    return content


def _tell(
    console: Console, part: str, key: Key, content: dict[str, Any], done: int, total: int, seconds: float
) -> None:
    """Prints a case's times in one line, with an estimate of the time left."""
    times = [
        f"{name} {found['us']:.2f}" if "us" in found else f"{name} {'absent' if 'absent' in found else '-'}"
        for name, found in content["contestants"].items()
        if name != PREDECESSOR
    ]
    wrong = [name for name, found in content["contestants"].items() if found.get("ok") is False]
    left = seconds / done * (total - done)
    line = f"[{done}/{total}, {left:.0f} s left] {part} {key[0]} M={key[1]} {key[2]}: {', '.join(times)}"
    console.print(line, markup=False, soft_wrap=True)
    for name in wrong:
        console.print(f"    WRONG: {name}: {content['contestants'][name]}", markup=False, soft_wrap=True)
    if "failed" in content:
        console.print(f"    FAILED: {content['failed']}", markup=False)


if __name__ == "__main__":
    main()
