"""What bounded memory on a CPU costs and saves: `python benchmarks/cpu_chunks.py`, two minutes on one thread.

The first table compares a frozen gate with chunks (GEMMs of few sizes; more than 512 tokens in chunks) and the same
gate without: the time with chunks divided by the time without. Calls of both take turns, and a time is the median. The
second table is the memory by which the process of a frozen gate of 2048 x 128 grows over calls with every number of
tokens from 1 to 2000.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from unittest.mock import patch

MODELS, TOKENS = ("deepseek-v3", "qwen3-30b-a3b", "gpt-oss-120b"), (1, 8, 33, 64, 100, 512, 2048, 8192)
LEAST_TURNS, SECONDS = 7, 0.7


def all_at_once() -> AbstractContextManager[object]:
    """Switches chunks off inside a `with`: one GEMM of all rows, whatever their number."""
    from moegate import chunks

    stack = ExitStack()
    stack.enter_context(patch.object(chunks, "_IS_SIZE", range(1 << 30)))
    stack.enter_context(patch.object(chunks, "_ROWS", 1 << 30))
    return stack


def ratio(call: Callable[[], object]) -> float:
    """The time with chunks divided by the time without."""
    times: dict[Callable[[], AbstractContextManager[object]], list[float]] = {nullcontext: [], all_at_once: []}
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or len(times[nullcontext]) < LEAST_TURNS:
        for how, found in times.items():
            with how():
                start = time.perf_counter()
                call()
                found.append(time.perf_counter() - start)
    in_chunks, whole = (statistics.median(found[1:]) for found in times.values())
    return in_chunks / whole


def growth(logits_dtype: str, *, whole: bool) -> float:
    """By how many MB this process grows over calls with every number of tokens from 1 to 2000."""
    import torch

    from moegate import Gate, RouterSpec

    spec = RouterSpec(2048, 128, 8, logits_dtype=logits_dtype)  # type: ignore[arg-type]
    gate = Gate(spec, torch.randn(128, 2048).bfloat16(), frozen=True)
    hidden = torch.randn(2000, 2048).bfloat16()
    with all_at_once() if whole else nullcontext():
        gate(hidden[:1])
        before = resident()
        for num_tokens in range(1, 2001):
            gate(hidden[:num_tokens])
    return resident() - before


def resident() -> float:
    """The memory of this process in MB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def main() -> None:
    """Prints both tables."""
    import torch

    from moegate import get_spec
    from moegate.synthetic import random_gate, random_hidden

    torch.set_num_threads(1)
    print("| model |" + "".join(f" {num_tokens} |" for num_tokens in TOKENS))
    print("|---|" + "---|" * len(TOKENS))
    for model in MODELS:
        spec = get_spec(model)
        gate = random_gate(spec)
        found = []
        for num_tokens in TOKENS:
            hidden = random_hidden(spec, num_tokens)
            found.append(ratio(lambda: gate(hidden)))  # noqa: B023 # called in this turn of the loop
        print(f"| {model} |" + "".join(f" {one:.2f} |" for one in found), flush=True)
    print("\n| logits | chunks, MB | all at once, MB |\n|---|---|---|")
    for logits_dtype in ("bfloat16", "float32"):
        grown = [run_alone("growth", logits_dtype, how) for how in ("chunks", "whole")]
        print(f"| {logits_dtype} | {grown[0]} | {grown[1]} |", flush=True)


def run_alone(*arguments: str) -> str:
    """Runs this file in a new process, whose memory holds nothing else; returns the process's output."""
    return subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        import torch

        torch.set_num_threads(1)
        print(f"{growth(sys.argv[2], whole=sys.argv[3] == 'whole'):.0f}")
    else:
        main()
