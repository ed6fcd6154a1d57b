"""The time of a call as users see it: by the clock on a CPU, by CUDA events on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ENOUGH = 300_000.0  # microseconds of measurements, after which a median is stable
_CALLS = 20  # in a graph, and between two events
_SLEEP = 100_000  # cycles, about 50 us


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call."""

    median_us: float
    repeats: int
    """The number of measurements behind `median_us`: of one call each on a CPU, of 20 calls each on a GPU."""
    graph_us: float | None = None
    """Of a call in a CUDA graph, without host time; None without a GPU."""


def time_call(call: Callable[[], object], device: torch.device) -> Timing:
    """Times a call after a warm-up: on a GPU by events around 20 calls, elsewhere by the clock."""
    if device.type != "cuda":
        times = _times(lambda: _clocked(call), least=20)
        return Timing(statistics.median(times), len(times))
    with torch.cuda.device(device):
        times = _times(lambda: _between_events(lambda: _many(call)), least=5)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            _many(call)
        replays = _times(lambda: _between_events(graph.replay, sleep=_SLEEP), least=5)
    return Timing(statistics.median(times) / _CALLS, len(times), statistics.median(replays) / _CALLS)


def _times(once: Callable[[], float], least: int) -> list[float]:
    """Microseconds of each run, after three to warm up: of `least` runs and 0.3 s or more, 1000 runs or 3 s at most."""
    for _ in range(3):
        once()
    times: list[float] = []
    total = 0.0
    while (len(times) < least or total < _ENOUGH) and len(times) < 1000 and total < 10 * _ENOUGH:
        times.append(once())
        total += times[-1]
    return times


def _clocked(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e6


def _many(call: Callable[[], object]) -> None:
    for _ in range(_CALLS):
        call()


def _between_events(work: Callable[[], object], sleep: int = 0) -> float:
    """Microseconds of the work on the GPU. With `sleep` cycles of sleep in front, the launch itself does not count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(sleep)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3
