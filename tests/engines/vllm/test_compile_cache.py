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
    """The compiled gates call moegate's operator when moegate is on, and only then.

    vLLM keeps a compiled model in a folder that it finds by its settings alone, before it traces anything: moegate must
    be one of these settings. (vLLM 0.32 then fails to load from that folder on a CPU, with and without moegate, and
    compiles anew, so that the folders are looked at here.)
    """
    checkpoint, cache = tmp_path / "checkpoint", tmp_path / "cache"
    vllm_models.write("qwen3_moe", checkpoint)
    ran, folders = [], []
    for number, switch in enumerate(("1", "0", "1")):
        result = tmp_path / f"{number}.pt"
        environment = os.environ | {"VLLM_CACHE_ROOT": str(cache), "MOEGATE": switch}
        command = [sys.executable, str(PROGRAM), str(checkpoint), str(result), "compile"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        ran.append(torch.load(result, weights_only=True)["gemms"] > 0)
        folders.append(len(list((cache / "torch_compile_cache" / "torch_aot_compile").iterdir())))
    assert ran == [True, False, True]
    assert folders == [1, 2, 2]
