"""Fetches the Python files of released vLLM wheels, without their dependencies, for tests/engines/vllm.

    python tools/vllm_sources.py FOLDER VERSION...

FOLDER then holds a folder for each version. The wheels are CUDA builds of 300 MB; what is kept is 40 to 60 MB of text.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def fetch(version: str, folder: Path) -> None:
    """Downloads one wheel by pip and keeps its Python files; nothing is done if they are there already."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", scratch, f"vllm=={version}"], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith("vllm/") and name.endswith(".py")]
            archive.extractall(folder, names)


if __name__ == "__main__":
    for wanted in sys.argv[2:]:
        fetch(wanted, Path(sys.argv[1]) / wanted)
