"""The examples for Transformers run as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[3] / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_generate(tmp_path: Path) -> None:
    assert f"wrote {tmp_path}" in run("tiny_qwen3_moe.py", tmp_path)
    takeover, ours, theirs = run("transformers_generate.py", tmp_path).splitlines()
    assert takeover == "moegate routes 3 of 3 MoE layers"
    tokens = ours.partition(":")[2].strip()
    assert len(tokens.split(",")) == 13
    assert theirs.partition(":")[2].strip() == tokens
