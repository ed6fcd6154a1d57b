"""Eager calls of two versions of moegate on one GPU: `python benchmarks/turns.py OLD/src NEW/src`.

Processes of the two versions take turns, each pinned to one core. In each, blocks of calls take turns with blocks of
`F.linear`, and a time is the median over the blocks. Prints a Markdown table of the times divided by those of
`F.linear` in the same process, the median over the turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time

TURNS, BLOCKS, CALLS = 4, 60, 100
CASES = (("deepseek-v3", 1), ("deepseek-v3", 16), ("qwen3-30b-a3b", 1))


def measure() -> dict[str, float]:
    """The ratios of one process."""
    import torch
    import torch.nn.functional as F

    import moegate
    from moegate.synthetic import random_hidden, random_tensors

    ratios = {}
    for model, tokens in CASES:
        spec = moegate.get_spec(model)
        weight, tensors = random_tensors(spec, device="cuda")
        hidden = random_hidden(spec, tokens, device="cuda")
        given = {name: tensor for name, tensor in tensors._asdict().items() if tensor is not None}
        frozen, not_frozen = (moegate.Gate(spec, weight, **given, frozen=frozen) for frozen in (True, False))
        with torch.no_grad():
            out = frozen(hidden, return_logits=True)
            calls = {
                "frozen": lambda: frozen(hidden),  # noqa: B023 # called in this turn of the loop
                "not frozen": lambda: not_frozen(hidden),  # noqa: B023
                "frozen, out=": lambda: frozen(hidden, out=out),  # noqa: B023
                "F.linear": lambda: F.linear(hidden, weight),  # noqa: B023
            }
            times: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(BLOCKS + 2):
                for name, call in calls.items():
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    for _ in range(CALLS):
                        call()  # type: ignore[no-untyped-call]
                    times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(found[2:]) for name, found in times.items()}  # the first two warm up
        for name in ("frozen", "not frozen", "frozen, out="):
            ratios[f"{model}, {tokens}, {name}"] = medians[name] / medians["F.linear"]
    return ratios


def main(old: str, new: str) -> None:
    """Runs both versions in turns, and prints the table."""
    found: dict[str, list[dict[str, float]]] = {old: [], new: []}
    for _ in range(TURNS):
        for source, ratios in found.items():
            path = os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
            command = ["taskset", "-c", "4", sys.executable, __file__]
            printed = subprocess.run(
                command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
            )
            ratios.append(json.loads(printed.stdout.splitlines()[-1]))
    print("| one call | before | after |\n|---|---|---|")
    for case in found[old][0]:
        before, after = (statistics.median(ratios[case] for ratios in found[source]) for source in (old, new))
        print(f"| {case} | {before:.3f} | {after:.3f} |")


if __name__ == "__main__":
    if len(sys.argv) == 3:
        main(*sys.argv[1:])
    else:
        print(json.dumps(measure()))
