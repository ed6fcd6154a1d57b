"""Checks that moegate fits beside the engines: that installing it there changes no package that an engine pins.

    python tools/check_pins.py [vllm==0.33.0 ...]

Asks pip for the metadata of each engine's wheel, without installing it. Each requirement of moegate's is held against
the engine's requirement of the same package, if there is one: some version must satisfy both, and where the engine
pins one version, that one. Packages that the engine does not require directly are listed; their versions come from what
else is installed. Exits with status 1 if a requirement cannot be met.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import requires
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ENGINES = ("vllm==0.26.0", "vllm==0.33.0", "sglang==0.5.23")
PYTHONS = ("3.11", "3.12")


def main(engines: tuple[str, ...]) -> int:
    """Prints a line for each requirement of moegate's beside each engine; the exit status."""
    failed = False
    for engine in engines:
        for python in PYTHONS:
            for line, is_met in beside(engine, python):
                print(f"{'ok  ' if is_met else 'FAIL'} {engine} on Python {python}: {line}")
                failed |= not is_met
    return int(failed)


def beside(engine: str, python: str) -> Iterator[tuple[str, bool]]:
    """For each requirement of moegate's: what the engine asks for, and whether both can be met."""
    theirs: dict[str, SpecifierSet] = {}
    for requirement in applying(requirements_of(engine, python), python):
        name = canonicalize_name(requirement.name)
        theirs[name] = theirs.get(name, SpecifierSet()) & requirement.specifier
    for requirement in applying(requires("moegate") or (), python):
        asked = theirs.get(canonicalize_name(requirement.name))
        if asked is None:
            yield f"{requirement}, which the engine does not ask for", True
        else:
            yield f"{requirement} beside {requirement.name}{asked}", can_be_met(requirement.specifier, asked)


def requirements_of(engine: str, python: str) -> list[str]:
    """The Requires-Dist of the engine's wheel."""
    with TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps", "--ignore-installed"]
        wanted = ["--only-binary=:all:", "--python-version", python, "--target", folder, "--report", str(report)]
        subprocess.run([*pip, *wanted, engine], check=True)
        (found,) = json.loads(report.read_text(encoding="utf-8"))["install"]
    required: list[str] = found["metadata"]["requires_dist"]
    return required


def applying(requirements: Iterable[str], python: str) -> Iterator[Requirement]:
    """Those that hold on Linux with this Python, without extras."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": "", "os_name": "posix"}
    environment |= {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement


def can_be_met(ours: SpecifierSet, theirs: SpecifierSet) -> bool:
    """True if one of the versions that the two name satisfies both.

    Enough for ranges that are closed at a version that they name, as all of moegate's are: where such ranges
    intersect, they do at the larger of their lower ends.
    """
    named = {specifier.version.removesuffix(".*") for specifier in (*ours, *theirs)}
    return any(ours.contains(version) and theirs.contains(version) for version in named) or not (ours and theirs)


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or ENGINES))
