"""The record of runs on a GPU, and when a run is stale for the current kernels."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gpu_runs
import pytest
import torch
from gpu_runs import Counts, Run

from moegate.measure import record

KERNELS = {"cuda/select.cuh": "11111111", "cuda/gemm.py": "22222222"}
PASSED = Run(
    "test-gpu",
    "2026-11-28T10:04:45+00:00",
    "NVIDIA H200",
    "580.159.04",
    "2.11.0+cu130",
    "13.0",
    "0.1.0",
    "dd490c5",
    "passed",
    2161,
    0,
    164,
    "cuda/select.cuh:11111111 cuda/gemm.py:22222222",
)
SANITIZED = replace(PASSED, command="sanitize-gpu", passed=4, skipped=0)
C_CODE = 'int a = 1;\nconst char *s = "// no comment";\n'
PYTHON_CODE = 'def f(x):\n    return f"# {x}"\n'


@pytest.fixture(autouse=True)
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty file of runs, and fixed kernels."""
    monkeypatch.setattr(gpu_runs, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_runs, "RUNS", tmp_path / "gpu_runs.csv")
    monkeypatch.setattr(gpu_runs, "kernels_now", lambda: KERNELS)
    return tmp_path / "gpu_runs.csv"


@pytest.mark.parametrize(
    ("suffix", "code", "same"),
    [
        (".cuh", C_CODE, "\n// a comment\n" + C_CODE),
        (".cuh", C_CODE, "/* of two\n   lines */" + C_CODE.replace(";\n", ";  // why\n\n")),
        (".py", PYTHON_CODE, '"""Of the module."""\n\n' + PYTHON_CODE),
        (".py", PYTHON_CODE, PYTHON_CODE.replace(":\n", ':  # why\n    """Of\n\n    two lines."""\n')),
    ],
)
def test_comments_and_blank_lines_are_no_change(suffix: str, code: str, same: str) -> None:
    assert gpu_runs.digest(suffix, same) == gpu_runs.digest(suffix, code)


@pytest.mark.parametrize(
    ("suffix", "code", "other"),
    [
        (".cuh", C_CODE, C_CODE.replace("1", "2")),
        (".cuh", C_CODE, C_CODE.replace("no comment", "one")),
        (".py", PYTHON_CODE, PYTHON_CODE.replace("# {x}", "# {x} ")),
        (".py", PYTHON_CODE, PYTHON_CODE.replace("    return", "  return")),
    ],
)
def test_code_is_a_change(suffix: str, code: str, other: str) -> None:
    assert gpu_runs.digest(suffix, other) != gpu_runs.digest(suffix, code)


def test_every_kernel_is_in_the_folders_that_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files = {path.relative_to(gpu_runs.PACKAGE).as_posix() for path in gpu_runs.PACKAGE.rglob("*.cuh")}
    assert len(files) >= 10
    assert files <= gpu_runs.kernels_now().keys()
    for path in gpu_runs.KERNEL_PATHS:
        assert any(name == path or name.startswith(f"{path}/") for name in gpu_runs.kernels_now())


NOT_YET = {"test_noticing_loaders.py", "test_wrappers.py"}  # written for any device, but not yet part of make test-gpu


def test_what_is_written_for_any_device_runs_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tests = gpu_runs.ROOT / "tests"
    texts = {path.name: path.read_text(encoding="utf-8") for path in tests.glob("test_*.py")}
    written = {name for name, text in texts.items() if re.search("^from on_device import", text, re.MULTILINE)}
    assert {path.name for name in gpu_runs.CONTRACT_TESTS for path in tests.glob(name)} == written - NOT_YET
    for name in gpu_runs.CONTRACT_TESTS:
        assert list(tests.glob(name)), name


def test_the_committed_runs_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for command in gpu_runs.COMMANDS:
        run = gpu_runs.last_run(command)
        assert run is not None
        assert run.passed > 0


def test_the_newest_run_of_a_command_is_the_last_one() -> None:
    assert gpu_runs.last_run("test-gpu") is None
    newer = replace(PASSED, date="2026-11-29T00:00:00+00:00", card="NVIDIA H100 80GB HBM3")
    for run in (newer, PASSED, SANITIZED):
        gpu_runs.add(run)
    assert gpu_runs.last_run("test-gpu") == newer
    assert gpu_runs.last_run("sanitize-gpu") == SANITIZED


def test_a_release_wants_both_runs_passed_with_these_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_runs.add(PASSED)
    gpu_runs.add(SANITIZED)
    assert gpu_runs.main(["check"]) == 0
    told = "last run 2026-11-28 on NVIDIA H200, torch 2.11.0+cu130, commit dd490c5"
    assert capsys.readouterr().out == (
        f"ok: make test-gpu: {told}: 2161 passed, 164 skipped\nok: make sanitize-gpu: {told}: 4 passed\n"
    )


@pytest.mark.parametrize("command", gpu_runs.COMMANDS)
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (None, "no run is recorded"),
        ({"outcome": "failed", "failed": 3, "passed": 9}, "commit dd490c5: FAILED, 3 failed, 9 passed"),
        ({"outcome": "interrupted", "passed": 0}, "commit dd490c5: INTERRUPTED, 0 passed"),
        ({"kernels": "cuda/select.cuh:33333333 cuda/gemm.py:22222222"}, "these changed since: cuda/select.cuh"),
        ({"kernels": "cuda/select.cuh:11111111"}, "these changed since: cuda/gemm.py"),
        ({"kernels": f"{PASSED.kernels} cuda/jit/old.py:33333333"}, "these changed since: jit/old.py"),
        ({"kernels": ""}, "STALE: these changed since: cuda/select.cuh, cuda/gemm.py"),
    ],
)
def test_no_release_without(
    command: str, change: dict[str, object] | None, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for run in (PASSED, SANITIZED):
        if run.command != command:
            gpu_runs.add(run)
        elif change is not None:
            gpu_runs.add(replace(run, **{"skipped": 0, **change}))  # type: ignore[arg-type]
    assert gpu_runs.main(["check"]) == 1
    first, second = sorted(capsys.readouterr().out.splitlines(), reverse=True)
    assert first.startswith("ok: make ")
    assert second.startswith(f"NOT FIT FOR A RELEASE: make {command}: ")
    assert second.endswith(why)


def test_of_many_changed_files_some_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_runs.add(PASSED)
    monkeypatch.setattr(gpu_runs, "kernels_now", lambda: {f"cuda/{index}.cuh": "0" for index in range(10)})
    assert gpu_runs.left_out().endswith(
        "cuda/0.cuh, cuda/1.cuh, cuda/2.cuh, cuda/3.cuh, cuda/4.cuh, cuda/5.cuh, cuda/6.cuh, cuda/7.cuh and 4 more"
    )


SOME_TESTS = """
import pytest
def test_passes(): pass
def test_passes_too(): pass
def test_fails(): assert False
@pytest.fixture
def broken(): raise OSError
def test_errs(broken): pass
def test_skips(): pytest.skip("why")
"""


def test_the_tests_of_a_report_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(SOME_TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--junitxml=report.xml", "--rootdir=."]
    subprocess.run([*command, "test_some.py"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    counts = Counts(passed=100)
    counts.add_report(tmp_path / "report.xml")
    assert counts == Counts(passed=102, failed=2, skipped=1)


Ran = Callable[[list[str]], int]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Callable[[Ran], list[list[str]]]:
    """Replaces the system's commands by a function, on a machine that pretends to have an H200."""
    found = {"gpu": "NVIDIA H200", "driver": "1", "torch": "2", "cuda": "3", "moegate": "4", "moegate_commit": "c"}
    monkeypatch.setattr(record, "describe_run", lambda command: {**found, "date": "2026-11-28"})
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr("signal.signal", lambda number, handler: None)

    def by(run: Ran) -> list[list[str]]:
        commands: list[list[str]] = []

        def replaced(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            return subprocess.CompletedProcess(command, run(command))

        monkeypatch.setattr("subprocess.run", replaced)
        return commands

    return by


def reporting(*ends: tuple[int, int]) -> Ran:
    """Imitates runs of pytest with 10 tests each, which end with the given (status, failures) in turn."""
    left = list(ends)

    def run(command: list[str]) -> int:
        status, failures = left.pop(0)
        (report,) = [word.partition("=")[2] for word in command if word.startswith("--junitxml=")]
        if status < 2:
            text = f'<testsuites><testsuite tests="10" failures="{failures}" errors="0" skipped="2"/></testsuites>'
            Path(report).write_text(text)
        return status

    return run


def test_both_halves_of_test_gpu_are_recorded(ran: Callable[[Ran], list[list[str]]]) -> None:
    commands = ran(reporting((0, 0), (0, 0)))
    assert gpu_runs.main(["test-gpu"]) == 0
    contract, gpu = commands
    assert contract[contract.index("--device") + 1] == "cuda"
    assert gpu[-1] == "tests/gpu"
    run = gpu_runs.last_run("test-gpu")
    assert run is not None
    assert (run.outcome, run.passed, run.failed, run.skipped) == ("passed", 16, 0, 4)
    machine = (run.card, run.driver, run.torch, run.cuda, run.moegate, run.commit, run.date)
    assert machine == ("NVIDIA H200", "1", "2", "3", "4", "c", "2026-11-28")
    assert run.changed(KERNELS) == []


@pytest.mark.parametrize(
    ("ends", "outcome", "failed"),
    [
        (((1, 3), (0, 0)), "failed", 3),
        (((0, 0), (1, 1)), "failed", 1),
        (((2, 0), (0, 0)), "interrupted", 0),
        (((0, 0), (-11, 0)), "interrupted", 0),
    ],
)
def test_a_run_that_did_not_pass_is_recorded_as_that(
    ran: Callable[[Ran], list[list[str]]], ends: tuple[tuple[int, int], ...], outcome: str, failed: int
) -> None:
    ran(reporting(*ends))
    assert gpu_runs.main(["test-gpu"]) == 1
    run = gpu_runs.last_run("test-gpu")
    assert run is not None
    assert (run.outcome, run.failed) == (outcome, failed)


def test_one_that_someone_stops_is_recorded_too(ran: Callable[[Ran], list[list[str]]]) -> None:
    def stop(command: list[str]) -> int:
        raise KeyboardInterrupt

    ran(stop)
    assert gpu_runs.main(["sanitize-gpu"]) == 1
    run = gpu_runs.last_run("sanitize-gpu")
    assert run is not None
    assert (run.outcome, run.passed) == ("interrupted", 0)


@pytest.mark.parametrize("wrong", [None, "racecheck"])
def test_the_sanitizers_that_found_nothing_are_counted(
    ran: Callable[[Ran], list[list[str]]], wrong: str | None
) -> None:
    commands = ran(lambda command: 9 if wrong in command else 0)
    assert gpu_runs.main(["sanitize-gpu"]) == (wrong is not None)
    assert [command[2] for command in commands] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    run = gpu_runs.last_run("sanitize-gpu")
    assert run is not None
    assert (run.outcome, run.passed, run.failed) == (("passed", 4, 0) if wrong is None else ("failed", 3, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("command", gpu_runs.COMMANDS)
def test_without_a_gpu_nothing_is_recorded(command: str, runs: Path) -> None:
    with pytest.raises(SystemExit, match="finds no CUDA device; nothing was run"):
        gpu_runs.main([command])
    assert not runs.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_run_without_a_gpu_says_which_tests_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    others = "--ignore-glob=tests/test_*"  # collecting them would be slow
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "tests", others]
    printed = subprocess.run(command, cwd=gpu_runs.ROOT, capture_output=True, text=True).stdout
    assert printed.count("GPU tests: ") == 1
    assert gpu_runs.left_out() in printed
    assert "no tests collected" in printed
