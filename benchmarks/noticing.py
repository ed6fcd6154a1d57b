"""The cost of noticing changed tensors: `python benchmarks/noticing.py`, on the CPU and any GPU.

Short blocks of ordinary calls, and of calls whose look always answers "unchanged", take turns, so that a busy machine
slows both. A time is the minimum over the blocks, since host time only grows by interference. Prints a Markdown table;
`--json FILE` writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import moegate
from moegate import Gate, RouterSpec
from moegate.cli.machine import cpu_name

SPEC = RouterSpec(2048, 128, 8, "sigmoid", "score", renormalize=True)
BLOCKS, CALLS = 400, 20


def nanoseconds(call: Callable[[], object]) -> float:
    """The mean time of a call over a block of calls."""
    start = time.perf_counter_ns()
    for _ in range(CALLS):
        call()
    return (time.perf_counter_ns() - start) / CALLS


def row(device: str, *, frozen: bool) -> dict[str, Any]:
    """The times of one token through a gate with a weight and a correction bias."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (
        torch.randn(rows, SPEC.hidden_size, generator=generator).bfloat16() for rows in (SPEC.num_experts, 1)
    )
    bias = torch.randn(SPEC.num_experts, generator=generator)
    gate = Gate(SPEC, weight.to(device), e_score_correction_bias=bias.to(device), frozen=frozen)
    hidden = hidden.to(device)

    noted = gate._notice()[0]
    blind = noted._replace(holds=lambda *_: True)
    look, nothing = (partial(ask, gate._parameters, gate._buffers) for ask in (noted.holds, lambda *_: True))
    times: dict[str, list[float]] = {"call": [], "call without the look": [], "look": [], "nothing": []}
    with torch.no_grad():
        for _ in range(BLOCKS):
            gate._noted = noted
            times["call"].append(nanoseconds(lambda: gate(hidden)))
            gate._noted = blind
            times["call without the look"].append(nanoseconds(lambda: gate(hidden)))
            times["look"].append(nanoseconds(look))
            times["nothing"].append(nanoseconds(nothing))
            if device != "cpu":
                torch.cuda.synchronize()
    least = {name: min(found) for name, found in times.items()}
    least["look"] -= least.pop("nothing")  # the overhead of the loop
    return {"device": device, "frozen": frozen, **least, "share": least["look"] / least["call"]}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    devices = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    rows = [row(device, frozen=frozen) for device in devices for frozen in (False, True)]
    names = [cpu_name(), *(torch.cuda.get_device_name() for _ in devices[1:])]
    print(f"{', '.join(names)}, torch {torch.__version__}, moegate {moegate.__version__}\n")
    print(
        "| device | gate | a call, ns | its look, ns | share | a call without the look, ns |\n|---|---|---|---|---|---|"
    )
    for each in rows:
        kind = "frozen" if each["frozen"] else "not frozen"
        print(
            f"| {each['device']} | {kind} | {each['call']:.0f} | {each['look']:.0f} | {each['share']:.1%} "
            f"| {each['call without the look']:.0f} |"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"machine": names, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
