"""The example for vLLM runs as a user runs it, with moegate and without."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


def run(name: str, *arguments: object, **environment: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    finished = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout + finished.stderr


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    run("tiny_qwen3_moe.py", folder)
    return folder


@pytest.mark.parametrize("switch", ["1", "0"])
def test_generate(checkpoint: Path, switch: str) -> None:
    printed = run("vllm_generate.py", checkpoint, MOEGATE=switch, VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1")
    assert ("moegate routes 3 of 3 MoE layers" in printed) == (switch == "1")
    assert re.search(r"^\[\d+(, \d+){7}\]$", printed, re.MULTILINE), printed
