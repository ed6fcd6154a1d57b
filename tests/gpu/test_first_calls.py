"""What is loaded and compiled before the first call of a gate, and what a call says that it waited for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_FIRST_CALLS = """
import json, sys, time
import torch, moegate
from moegate.synthetic import random_hidden, random_tensors
spec = moegate.get_spec("qwen3-30b-a3b")
weight, tensors = random_tensors(spec, device="cuda")
if sys.argv[1] == "gate":
    gate = moegate.Gate(spec, weight, frozen=True)
else:
    gate = moegate.GateLinear(weight, out_dtype=torch.bfloat16)
plan = gate._noted.dispatch.plan
seconds = {}
for first in [span.first for span in plan.spans]:
    hidden = random_hidden(spec, first, device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    gate(hidden)
    torch.cuda.synchronize()
    seconds[first] = time.perf_counter() - start
print(json.dumps(seconds))
"""
_FLOAT16 = """
import torch, moegate
from moegate.synthetic import random_hidden, random_tensors
spec = moegate.get_spec("qwen3-30b-a3b")
weight, tensors = random_tensors(spec, device="cuda")
gate = moegate.Gate(spec, weight, frozen=True)
for _ in range(3):
    gate(random_hidden(spec, 1, device="cuda").half())
gate.warmup(torch.float32)
"""


def run(code: str, *arguments: str, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A new process, in which nothing has used cuBLAS; `cache`: an empty folder for compiled kernels."""
    # NVRTC has a cache of its own, in which an earlier test may have left the same kernel.
    empty = {"XDG_CACHE_HOME": str(cache), "CUDA_CACHE_DISABLE": "1"}
    environment = os.environ | ({} if cache is None else empty)
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("kind", ["gate", "linear"])
def test_the_first_calls_wait_for_nothing(kind: str) -> None:
    """At the first number of tokens of each kernel. The first use of cuBLAS takes 45 ms and more."""
    seconds = json.loads(run(_FIRST_CALLS, kind).stdout)
    assert len(seconds) > 1
    assert max(seconds.values()) < 0.015, seconds


def test_a_call_says_once_that_it_waited_for_a_compiler(tmp_path: Path) -> None:
    told = run(_FLOAT16, cache=tmp_path).stderr
    words = "for kernels to be compiled (2048 x 128, top 8; float16 hidden, bfloat16 weight"
    assert told.count(words) == 1, told
