"""Processes in which SGLang is imported and no plugin is loaded yet, each for one piece of code.

Importing SGLang takes seconds. So one process imports it, and a fork of that process runs each piece.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO


def in_another_process(code: str, **environment: str) -> str:
    """What the code prints, on both outputs, in a process with these variables; it must succeed."""
    requests, answers = _server()
    with TemporaryDirectory() as folder:
        output = Path(folder, "output")
        requests.write(json.dumps([code, environment, str(output)]) + "\n")
        requests.flush()
        status = answers.readline().strip()
        printed = output.read_text(encoding="utf-8")
    assert status == "0", printed
    return printed


@cache
def _server() -> tuple[IO[str], IO[str]]:
    """The pipes to the process that forks; it ends when this process does, with its input."""
    without = {name: value for name, value in os.environ.items() if not name.startswith(("MOEGATE", "SGLANG"))}
    here = str(Path(__file__).parent)
    server = subprocess.Popen(
        [sys.executable, "-u", __file__],
        env={**without, "SGLANG_USE_CPU_ENGINE": "1", "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": here},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    return server.stdin, server.stdout


def serve() -> None:
    """Imports SGLang, then forks for each line of the input."""
    import sglang_stubs

    sglang_stubs.install()
    from sglang.srt.layers.moe import topk  # noqa: F401
    from sglang.srt.model_executor import model_runner  # noqa: F401
    from sglang.srt.models import deepseek_v2  # noqa: F401

    for line in sys.stdin:
        code, environment, output = json.loads(line)
        child = os.fork()
        if child == 0:
            run(code, environment, output)
        print(os.waitpid(child, 0)[1], flush=True)


def run(code: str, environment: dict[str, str], output: str) -> None:
    """Runs a piece of code, and ends the process."""
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    status = 0
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    serve()
