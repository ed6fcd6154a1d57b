"""torch.compile with one warm cache: on, off and on again do what they say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import vllm_models

PROGRAM = Path(__file__).parents[2] / "support" / "vllm_program.py"


def test_one_cache_for_both(tmp_path: Path) -> None:
    """moegate's operator runs in the compiled gates when moegate is on, and only then, also from a warm cache."""
    checkpoint = tmp_path / "checkpoint"
    vllm_models.write("qwen3_moe", checkpoint)
    found = []
    for number, switch in enumerate(("0", "1", "0", "1")):
        result = tmp_path / f"{number}.pt"
        environment = os.environ | {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "MOEGATE": switch}
        command = [sys.executable, str(PROGRAM), str(checkpoint), str(result), "compile"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        log = done.stdout + done.stderr
        assert done.returncode == 0, log[-4000:]
        is_warm = "Directly load AOT compilation" in log
        found.append((torch.load(result, weights_only=True)["gemms"] > 0, is_warm))
    assert found == [(False, False), (True, False), (False, True), (True, True)]
