"""Fixtures and options of all tests."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from typing import Any

import gpu_runs
import on_device
import pytest
import torch
from hypothesis import settings
from machines import forget
from torch import Tensor

from moegate.choice import tables
from moegate.cuda import device as gpu
from moegate.warn import warn_once

GPU_TESTS = Path(__file__).parent / "gpu"
ENGINE_TESTS = Path(__file__).parent / "engines"

# Every run draws the same examples, so that failures are reproducible; `--hypothesis-profile explore` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where the contract's tests run moegate (default: cpu)"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets the device, and one thread for each worker of pytest-xdist, so that threads do not compete for cores."""
    device = config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: PyTorch finds no CUDA device on this machine; allowed here: cpu")
    if not torch.cuda.is_available() and any(path.is_relative_to(GPU_TESTS) for path in _asked_for(config)):
        raise pytest.UsageError("tests/gpu: PyTorch finds no CUDA device on this machine")
    on_device.DEVICE = torch.device(device)
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def _asked_for(config: pytest.Config) -> list[Path]:
    """The files and folders of the command line."""
    return [Path(config.invocation_params.dir, word.partition("::")[0]).resolve() for word in config.args]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests of the CPU alone in a run on another device; the run's summary counts them, with the reason."""
    if on_device.DEVICE.type == "cpu":
        return
    skip = pytest.mark.skip(reason=f"about the CPU alone, and this run is on {on_device.DEVICE.type}")
    for item in items:
        if item.get_closest_marker("cpu"):
            item.add_marker(skip)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """True for tests/gpu without a CUDA device; the run's summary says so, and has the date of their last run.

    And for tests/engines, unless the command line names one of them: each engine has an environment of its own.
    """
    if collection_path == ENGINE_TESTS:
        return None if any(path.is_relative_to(ENGINE_TESTS) for path in _asked_for(config)) else True
    return True if collection_path == GPU_TESTS and not torch.cuda.is_available() else None


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The weights that gates prepared since the test began."""
    from noticing_gates import record_prepared  # whose tensors lie where `pytest_configure` says

    return record_prepared(monkeypatch)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the contract's tests run moegate."""
    return on_device.DEVICE


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    _tell_registers(terminalreporter)
    if not torch.cuda.is_available() and any(GPU_TESTS.is_relative_to(path) for path in _asked_for(config)):
        terminalreporter.write_line(gpu_runs.left_out())


def _tell_registers(terminalreporter: Any) -> None:
    """Prints the least and the largest number of registers of each kernel that test_cuda_compile.py compiled."""
    found: dict[str, dict[str, list[int]]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for arch, kernel, count in re.findall(r"^(sm_\w+) (\w+): (\d+) registers", report.capstdout, re.MULTILINE):
            found.setdefault(arch, {}).setdefault(kernel, []).append(int(count))
    if found:
        terminalreporter.section("registers of the kernels, none spilled")
    for arch, kernels in sorted(found.items()):
        shown = (f"{kernel} {min(counts)}-{max(counts)}" for kernel, counts in sorted(kernels.items()))
        terminalreporter.write_line(f"{arch:<8} {'  '.join(shown)}")


@pytest.fixture(autouse=True)
def fresh_warnings() -> None:
    """Lets warnings that are given once a process appear in each test."""
    warn_once.cache_clear()


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Forgets what torch.compile compiled in earlier tests: after eight times, a function is not compiled any more."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Makes unwritten memory visible: new tensors hold NaN, or ids far out of range, instead of old contents."""
    # `torch.device("meta")` as a context knows these functions by identity, and looks them up once.
    torch.utils._device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
            (gpu, "_empty_strided_cuda"),
        ):
            if getattr(owner, name) is None:  # some versions of PyTorch lack one
                continue
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


def _poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(make)
    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        fresh = make(*args, **kwargs)
        with torch.no_grad():  # a new parameter may require a gradient
            if fresh.is_floating_point():
                fresh.fill_(torch.nan)
            elif fresh.dtype in (torch.int32, torch.int64):
                fresh.fill_(-(2**30))
        return fresh

    return poisoned


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Replaces the package's cost tables by those of the test; the user's folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def ship(*given: tables.Table) -> None:
        forget()
        files = [tmp_path / f"{index}.json" for index in range(len(given))]
        for file, table in zip(files, given, strict=True):
            tables.write(file, table)
        monkeypatch.setattr(tables, "_shipped", lambda: files)

    forget()
    yield ship
    forget()
