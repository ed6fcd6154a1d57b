"""Makes .venv, in which the Makefile's commands run; at once if it is there and nothing has changed.

A torch that the running Python already has is used as it is, if pyproject.toml admits it: on a GPU
host that is the one with CUDA. Otherwise pip installs the version pinned in constraints.txt.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "made-from"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_TORCH = (2, 8)  # as in pyproject.toml


def host_torch() -> tuple[str, Path] | None:
    """The version and the folder of a fitting torch of the running Python."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    version = importlib.metadata.version("torch")
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or tuple(map(int, release.groups())) < OLDEST_TORCH:
        return None
    return version, Path(found.origin).parent.parent


def main() -> None:
    """Makes the environment if it is not there as it should be."""
    torch = host_torch()
    inputs = [sys.executable, sys.version, repr(torch), str(ROOT)]
    inputs += [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt", "tools/environment.py")]
    fingerprint = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    if STAMP.is_file() and STAMP.read_text() == fingerprint:
        return

    source = f"torch {torch[0]} of {sys.executable}" if torch else "torch from the package index"
    print(f"Making {VENV.name} with Python {sys.version.split()[0]} and {source}; about a minute.", flush=True)
    if VENV.exists():
        shutil.rmtree(VENV)
    venv.create(VENV, with_pip=True)
    python = VENV / "bin" / "python"
    constraints = CONSTRAINTS.read_text()
    if torch:
        # A .pth file, not --system-site-packages: the running Python may be in an environment of its own.
        site = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
        Path(site, "host_torch.pth").write_text(f"{torch[1]}\n")
        constraints = re.sub(r"^torch==.*$", f"torch=={torch[0]}", constraints, flags=re.MULTILINE)
    pinned = VENV / "constraints.txt"
    pinned.write_text(constraints)
    # The variable, not -c, also holds for the environment in which pip builds our wheel.
    environment = {**os.environ, "PIP_CONSTRAINT": str(pinned), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([python, "-m", "pip", "install", "-q", "-e", f"{ROOT}[dev]"], check=True, env=environment)
    STAMP.write_text(fingerprint)


if __name__ == "__main__":
    main()
