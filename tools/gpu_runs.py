"""Runs and records `make test-gpu` and `make sanitize-gpu`, since CI has no GPU.

    python tools/gpu_runs.py test-gpu        # runs the tests on this GPU, and adds a row
    python tools/gpu_runs.py sanitize-gpu    # runs every kernel under compute-sanitizer, and adds a row
    python tools/gpu_runs.py check           # `make release-check`: did the last run of each pass, with these kernels?

Each run is a row of benchmarks/results/gpu_runs.csv, also if it failed or was interrupted.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import NoReturn
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "benchmarks" / "results" / "gpu_runs.csv"
PACKAGE = ROOT / "src" / "moegate"
KERNEL_PATHS = (
    "cuda",
    "gemm",
    "selection",
    "contract/limits.py",
    "choice/by_tokens.py",
    "choice/dispatch.py",
    "halves.py",
    "problem.py",
)
"""Folders and files of the package that determine which kernels run, how they are called, and what they compute."""
CONTRACT_TESTS = (
    "test_contract_*.py",
    "test_gate.py",
    "test_gate_linear.py",
    "test_top_k.py",
    "test_properties.py",
    "test_arguments.py",
    "test_ops.py",
    "test_noticing.py",
    "test_noticing_misfits.py",
    "test_noticing_states.py",
    "test_noticing_threads.py",
    "test_noticing_options.py",
)
"""Files of tests/ that run on a CPU and, with `--device cuda`, on a GPU."""
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
_C_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/', re.DOTALL)
_NAMED = 8  # the most changed files that are named in a line


@dataclass
class Counts:
    """Counts of tests, or of tools of compute-sanitizer."""

    passed: int = 0
    failed: int = 0
    skipped: int = 0

    def add_report(self, report: Path) -> None:
        """Adds the counts of a report that pytest wrote with --junitxml."""
        for suite in ElementTree.parse(report).getroot().iter("testsuite"):
            total, failures, errors, skipped = (
                int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
            )
            self.failed += failures + errors
            self.skipped += skipped
            self.passed += total - failures - errors - skipped

    def __str__(self) -> str:
        shown = {"failed": self.failed, "passed": self.passed, "skipped": self.skipped}
        return ", ".join(f"{count} {name}" for name, count in shown.items() if count or name == "passed")


@dataclass(frozen=True)
class Run:
    """A row of the file."""

    command: str
    date: str
    card: str
    driver: str
    torch: str
    cuda: str
    moegate: str
    commit: str
    outcome: str
    """passed, failed or interrupted"""
    passed: int
    failed: int
    skipped: int
    kernels: str
    """NAME:DIGEST of every file that determines a kernel, separated by blanks"""

    def __str__(self) -> str:
        found = Counts(self.passed, self.failed, self.skipped)
        outcome = "" if self.outcome == "passed" else f"{self.outcome.upper()}, "
        return f"{self.date[:10]} on {self.card}, torch {self.torch}, commit {self.commit}: {outcome}{found}"

    def changed(self, kernels: dict[str, str]) -> list[str]:
        """The files whose digests differ from this run's."""
        then = dict(entry.split(":") for entry in self.kernels.split())
        return sorted(name for name in then.keys() | kernels.keys() if then.get(name) != kernels.get(name))


def last_run(command: str) -> Run | None:
    """The newest run of a command."""
    if not RUNS.exists():
        return None
    with RUNS.open(newline="", encoding="utf-8") as text:
        rows = [row for row in csv.DictReader(text) if row["command"] == command]
    if not rows:
        return None
    newest = max(rows, key=lambda row: row["date"])
    counts = {name: int(newest.pop(name)) for name in ("passed", "failed", "skipped")}
    return Run(**newest, **counts)  # type: ignore[arg-type]


def add(run: Run) -> None:
    """Adds a row at the end of the file."""
    is_new = not RUNS.exists()
    with RUNS.open("a", newline="", encoding="utf-8") as text:
        writer = csv.writer(text, lineterminator="\n")
        if is_new:
            writer.writerow(field.name for field in fields(Run))
        writer.writerow(astuple(run))


def kernels_now() -> dict[str, str]:
    """The digest of each file that determines a kernel, by the file's path in the package."""
    named = [PACKAGE / name for name in KERNEL_PATHS]
    paths = {path for each in named for path in (each, *each.rglob("*")) if path.suffix in _CODE}
    return {
        path.relative_to(PACKAGE).as_posix(): digest(path.suffix, path.read_text("utf-8")) for path in sorted(paths)
    }


def digest(suffix: str, text: str) -> str:
    """A digest of the code alone, without comments, docstrings, blank lines and the indentation of C++."""
    lines = (line.rstrip() for line in _CODE[suffix](text).splitlines())
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:8]


def _c_code(text: str) -> str:
    code = _C_COMMENT.sub(lambda found: found[1] or " ", text)
    return "\n".join(line.strip() for line in code.splitlines())


def _python_code(text: str) -> str:
    """Cuts comments and docstrings by position, since kinds of tokens differ between versions of Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(lines)


_CODE: dict[str, Callable[[str], str]] = {".cuh": _c_code, ".py": _python_code}


def left_out() -> str:
    """The line for the summary of a run of pytest without tests/gpu."""
    return f"GPU tests: tests/gpu left out (no CUDA device); {verdict('test-gpu')[0]}"


def verdict(command: str) -> tuple[str, bool]:
    """The last run of a command in words, and whether that run suffices for a release of the current kernels."""
    run = last_run(command)
    if run is None:
        return "no run is recorded", False
    changed = sorted(run.changed(kernels_now()), key=lambda name: not name.endswith(".cuh"))  # the kernels first
    names = ["/".join(name.split("/")[-2:]) for name in changed]
    if not names:
        return f"last run {run}", run.outcome == "passed"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"last run {run}; STALE: these changed since: {', '.join(names[:_NAMED])}{more}", False


def check() -> int:
    """Prints a line for each command; returns the exit status."""
    verdicts = {command: verdict(command) for command in COMMANDS}
    for command, (text, is_fit) in verdicts.items():
        print(f"{'ok' if is_fit else 'NOT FIT FOR A RELEASE'}: make {command}: {text}")
    return 0 if all(is_fit for _, is_fit in verdicts.values()) else 1


def run_tests(counts: Counts) -> bool:
    """Runs the contract's tests on the GPU, then tests/gpu; False if pytest itself failed in either."""
    contract = sorted(str(path) for name in CONTRACT_TESTS for path in (ROOT / "tests").glob(name))
    whole = True
    with tempfile.TemporaryDirectory() as scratch:
        for number, chosen in enumerate((["--device", "cuda", *contract], ["tests/gpu"])):
            report = Path(scratch, f"{number}.xml")
            options = ["-q", "-n", "auto", "-p", "no:cacheprovider", "-p", "no:benchmark", f"--junitxml={report}"]
            status = subprocess.run([sys.executable, "-m", "pytest", *options, *chosen], cwd=ROOT).returncode
            if report.exists():
                counts.add_report(report)
            whole &= status in (0, 1)
    return whole


def run_sanitizers(counts: Counts) -> bool:
    """Runs every kernel under each tool, without PyTorch's caching allocator, so that out-of-bounds accesses show."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZERS:
        print(f"== {tool}", flush=True)
        options = ["--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
        program = [sys.executable, str(ROOT / "tests" / "support" / "sanitized.py")]
        clean = subprocess.run(["compute-sanitizer", *options, *program], env=environment).returncode == 0
        counts.passed += clean
        counts.failed += not clean
    return True


COMMANDS: dict[str, Callable[[Counts], bool]] = {"test-gpu": run_tests, "sanitize-gpu": run_sanitizers}


def record(command: str) -> int:
    """Runs a command and adds its row; returns the exit status."""
    from moegate.measure.record import describe_run

    found = describe_run(f"make {command}")
    if found["gpu"] is None:
        raise SystemExit(f"make {command}: PyTorch finds no CUDA device; nothing was run")
    if command == "sanitize-gpu" and shutil.which("compute-sanitizer") is None:
        raise SystemExit(f"make {command}: no compute-sanitizer; nothing was run")
    kernels = " ".join(f"{name}:{value}" for name, value in kernels_now().items())
    signal.signal(signal.SIGTERM, _interrupt)
    counts, whole = Counts(), False
    try:
        whole = COMMANDS[command](counts)
    except KeyboardInterrupt:
        print("interrupted")
    outcome = ("failed" if counts.failed or not counts.passed else "passed") if whole else "interrupted"
    run = Run(
        command=command,
        date=found["date"],
        card=found["gpu"],
        driver=found["driver"],
        torch=found["torch"],
        cuda=found["cuda"],
        moegate=found["moegate"],
        commit=found["moegate_commit"],
        outcome=outcome,
        kernels=kernels,
        **asdict(counts),
    )
    add(run)
    print(f"recorded in {RUNS.relative_to(ROOT)}: {command}, {run}")
    return 0 if outcome == "passed" else 1


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(words: Sequence[str]) -> int:
    """Runs a command; returns its exit status."""
    if list(words) == ["check"]:
        return check()
    if len(words) == 1 and words[0] in COMMANDS:
        return record(words[0])
    raise SystemExit(__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
