"""Host time of a call, and the time to the first token in a new process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moegate
from moegate import Gate
from moegate.arguments import check_gate
from moegate.contract.verify import verify_call
from moegate.measure.names import DEFAULT, DEFAULT_NOT_FROZEN, GIVEN_OUT
from moegate.measure.timing import reason_of
from moegate.synthetic import random_hidden, random_tensors

_BLOCKS, _CALLS = 21, 200  # a stream queues about 1000 launches, and then blocks the host; a block has fewer

# The clock starts after the import of torch and the CUDA context, which every PyTorch program needs anyway.
_START = """
import json, sys, time
import torch
torch.zeros(1, device="cuda").add_(1)
torch.cuda.synchronize()
generator = torch.Generator().manual_seed(0)
hidden = torch.randn(1, 7168, generator=generator).bfloat16().cuda()
weight = (torch.randn(256, 7168, generator=generator) * 7168 ** -0.5).bfloat16().cuda()
bias = torch.zeros(256, device="cuda")
torch.cuda.synchronize()
start = time.perf_counter()
import moegate
gate = moegate.Gate(moegate.get_spec("deepseek-v3"), weight, e_score_correction_bias=bias, frozen=True)
routing = gate(hidden)
ids = routing.topk_ids.tolist()[0]
seconds = time.perf_counter() - start
scores = torch.sigmoid((hidden.double() @ weight.double().t()).cpu())[0]
groups = scores.view(8, 32).topk(2).values.sum(-1).topk(4).indices.tolist()
allowed = [e for g in sorted(groups) for e in range(32 * g, 32 * g + 32)]
best = sorted(allowed, key=lambda e: -scores[e])[:8]
print(json.dumps({"seconds": seconds, "ok": sorted(ids) == sorted(best)}))
"""


def measure_host(model: str, tokens: int) -> dict[str, Any]:
    """Microseconds of host time for an eager call; blocks of calls of the contestants take turns."""
    spec = moegate.get_spec(model)
    weight, tensors = random_tensors(spec, device="cuda")
    hidden = random_hidden(spec, tokens, device="cuda")
    given = {key: value for key, value in tensors._asdict().items() if value is not None}
    frozen, not_frozen = (Gate(spec, weight, **given, frozen=frozen) for frozen in (True, False))
    out = frozen(hidden, return_logits=True)
    calls: dict[str, Callable[[], Any]] = {
        DEFAULT: lambda: frozen(hidden),
        DEFAULT_NOT_FROZEN: lambda: not_frozen(hidden),
        GIVEN_OUT: lambda: frozen(hidden, out=out),
        "moegate.route": lambda: moegate.route(hidden, weight, spec, **given),
        "F.linear": lambda: F.linear(hidden, weight),
        "torch.mm(out_dtype=float32)": lambda: torch.mm(hidden, weight.t(), out_dtype=torch.float32),
    }
    ok = _keeps_contract(frozen, hidden) and _keeps_contract(not_frozen, hidden)
    for call in calls.values():
        _block(call)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_BLOCKS):
        for name, call in calls.items():
            times[name].append(_block(call))
    found: dict[str, Any] = {}
    for name, column in times.items():
        deciles = statistics.quantiles(column, n=10, method="inclusive")
        values = {"us": statistics.median(column), "low": deciles[0], "high": deciles[-1]}
        found[name] = {**values, "ok": True} if ok or not name.startswith("moegate") else {"ok": False}
    return {"calls": _CALLS, "contestants": found}


def _block(call: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_CALLS):
        call()
    return (time.perf_counter() - start) / _CALLS * 1e6


def _keeps_contract(gate: Gate, hidden: Tensor) -> bool:
    weight, tensors = check_gate(gate._given(), gate.spec)
    return verify_call(gate(hidden, return_logits=True), hidden, weight, gate.spec, tensors).ok


def measure_start(way: str) -> dict[str, Any]:
    """Seconds from `import moegate` to a routed token: "cold" compiles all kernels, "warm" reads them from the disk."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "XDG_CACHE_HOME": cache, "CUDA_CACHE_PATH": os.path.join(cache, "driver")}
        runs = [_start(environment) for _ in range(1 if way == "cold" else 3)]
    runs = runs if way == "cold" else runs[1:]
    failed = [run["absent"] for run in runs if "absent" in run]
    if failed:
        return {"contestants": {DEFAULT: {"absent": failed[0]}}}
    ok = all(run["ok"] for run in runs)
    seconds = [run["seconds"] for run in runs]
    found = {"ok": ok, **({"seconds": min(seconds), "all_seconds": seconds} if ok else {})}
    return {"contestants": {DEFAULT: found}}


def _start(environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-c", _START]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    except subprocess.CalledProcessError as error:
        return {"absent": f"exit {error.returncode}: {error.stderr.strip()[-300:]}"}
    except subprocess.TimeoutExpired as error:
        return {"absent": reason_of(error)}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result
