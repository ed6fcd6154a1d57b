"""The example that needs no engine runs as a user runs it; those of the engines: tests/engines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_route() -> None:
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "route.py")], check=True, capture_output=True, text=True
    ).stdout
    assert "dtype=torch.int32" in finished
    assert "[2.5000, 2.5000, 2.5000, 2.5000]" in finished
    assert "4 tokens: torch mm+ops" in finished
