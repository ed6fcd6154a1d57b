"""Makes .venv, in which the Makefile's commands run, unless .venv is up to date.

If the running Python has a torch that pyproject.toml admits, .venv uses this torch and its requirements: on a GPU host,
the torch with CUDA. Otherwise pip installs the version pinned in constraints.txt.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "made-from"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST_TORCH = (2, 8)  # as in pyproject.toml


class Torch(NamedTuple):
    """The torch of the running Python."""

    version: str
    cuda: str | None
    """The CUDA version that it was built for."""
    site: Path
    """The folder with torch and its requirements."""


def host_torch() -> Torch | None:
    """The running Python's torch, if its version is admitted."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    version, folder = importlib.metadata.version("torch"), Path(found.origin).parent
    release = re.match(r"(\d+)\.(\d+)", version)
    if release is None or tuple(map(int, release.groups())) < OLDEST_TORCH:
        return None
    return Torch(version, runpy.run_path(str(folder / "version.py"))["cuda"], folder.parent)


def extras(torch: Torch | None) -> str:
    """The extras of pyproject.toml to install; NVRTC is among them, since tests without a GPU compile the kernels."""
    if sys.platform != "linux":
        return "dev"
    return "dev,cu12" if torch is not None and (torch.cuda or "").startswith("12.") else "dev,cu13"


def constraints(torch: Torch | None) -> str:
    """The text of constraints.txt, without the pins of packages that the host's torch determines."""
    text = CONSTRAINTS.read_text()
    if torch is None:
        return text
    lifted = {"torch", *needed_by("torch")} | ({"cuda-bindings"} if "cu12" in extras(torch) else set())
    kept = [line for line in text.splitlines() if _canonical(line.partition("==")[0]) not in lifted]
    return "\n".join([*kept, f"torch=={torch.version}", ""])


def needed_by(name: str, extra: str = "", found: set[str] | None = None) -> set[str]:
    """The names of all packages that a package of the running Python requires, with its extras ("nvrtc,cudart")."""
    found = set() if found is None else found
    try:
        requirements = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return found
    for requirement in requirements:
        wanted, _, marker = requirement.partition(";")
        only = re.search(r"""extra\s*==\s*["']([^"']+)""", marker)
        parts = re.match(r"\s*([\w.-]+)\s*(?:\[([^]]*)])?", wanted)
        if parts is None or (only is not None and only[1] not in extra.split(",")):
            continue
        other = _canonical(parts[1])
        if other not in found:
            found.add(other)
            needed_by(other, parts[2] or "", found)
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    """Makes the environment, unless it is up to date."""
    torch = host_torch()
    inputs = [sys.executable, sys.version, repr(torch), str(ROOT)]
    inputs += [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt", "tools/environment.py")]
    fingerprint = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    if STAMP.is_file() and STAMP.read_text() == fingerprint:
        return

    source = f"torch {torch.version} of {sys.executable}" if torch else "torch from the package index"
    print(f"Making {VENV.name} with Python {sys.version.split()[0]} and {source}; about a minute.", flush=True)
    if VENV.exists():
        shutil.rmtree(VENV)
    venv.create(VENV, with_pip=True)
    python = VENV / "bin" / "python"
    if torch:
        # A .pth file, not --system-site-packages, since the running Python may itself be in a virtual environment.
        site = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
        Path(site, "host_torch.pth").write_text(f"{torch.site}\n")
    pinned = VENV / "constraints.txt"
    pinned.write_text(constraints(torch))
    # A variable, not -c, since the variable also applies where pip builds the wheel of moegate.
    environment = {**os.environ, "PIP_CONSTRAINT": str(pinned), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    what = f".[{extras(torch)}]"
    install = [str(python), "-m", "pip", "install", "-q", "-e", what]
    if torch:  # other packages of the host may require other versions; they are not used here
        install.append("--no-warn-conflicts")
    if subprocess.run(install, env=environment, cwd=ROOT).returncode:
        sys.exit(f"pip failed; what it says without -q: PIP_CONSTRAINT={pinned} {python} -m pip install -e '{what}'")
    STAMP.write_text(fingerprint)


if __name__ == "__main__":
    main()
