"""How long a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_ENOUGH = 300_000.0  # microseconds, for a median to settle
_CALLS = 20  # of a graph, or between two events
_SLEEP = 100_000  # cycles, some 50 us


@dataclass(frozen=True)
class Timing:
    """Microseconds of a call."""

    median_us: float
    repeats: int
    """Of so many measurements `median_us` is the median: of one call each, on a GPU of 20."""
    graph_us: float | None = None
    """Of a call in a CUDA graph, in which the host takes no part; None without a GPU."""


def time_call(call: Callable[[], object], device: torch.device) -> Timing:
    """Times a call after a warm-up: on a GPU between two events around many of them, elsewhere by the clock."""
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
    """At least so many times and 0.3 s of them, at most 1000 or 3 s, in microseconds, after a few to warm up."""
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
    """`sleep` keeps the GPU busy until the host has launched a graph, which is not to count."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(sleep)
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3
