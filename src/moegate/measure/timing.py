"""Times calls: CUDA graphs of many calls, replayed in turns, give the time of one call and the noise of that time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moegate.measure.cuda_kernels import PREDECESSOR_US, Predecessors
from moegate.measure.names import PREDECESSOR

WARM_UP, REPLAYS = 10, 30
MAX_CALLS, LAYERS = 256, 58  # DeepSeek-V3 has 58 routers
ROTATION_BYTES = 128e6  # an H200's L2 holds 60 MB
_CYCLES_PER_SECOND = 2e9
_LEAST_AHEAD = 100e-6  # seconds that the GPU sleeps at least, so that the host enqueues a whole replay ahead of the GPU


@dataclass
class Contestant:
    """What is timed: a call, and the check of its results."""

    name: str
    call: Callable[[int, Tensor], Any]
    """(layer, hidden) -> the result, in newly allocated memory."""
    check: Callable[[list[Any], Sequence[tuple[int, int]]], dict[str, Any]]
    """Results of all calls and their (source, layer) -> {"ok": ..., findings}."""
    slow: bool = False
    """Replayed in every fourth turn only."""


@dataclass
class Workload:
    """The calls of a graph: their inputs and their layers, in turn."""

    sources: list[Tensor]
    """Two batches of hidden states in turn, so that a stale read gives a wrong result."""
    layers: int
    calls: int
    predecessors: Predecessors = field(default_factory=Predecessors)

    def order(self, way: str) -> list[tuple[int, int]]:
        """(source, layer) of each call."""
        return [(i % 2, 0 if way == "hot" else i % self.layers) for i in range(self.calls)]


def layer_count(weight_bytes: int, fewest: int = LAYERS) -> int:
    """The number of layers whose weights together exceed L2; at most `MAX_CALLS`."""
    return min(MAX_CALLS, max(fewest, int(ROTATION_BYTES // weight_bytes) + 1))


def measure(work: Workload, way: str, contestants: list[Contestant]) -> dict[str, dict[str, Any]]:
    """Times the contestants in one way: "cold", "hot", or in a chain behind the predecessor "trigger" or "norm".

    Returns:
        By name: `us` (median), `low` and `high` (10th and 90th percentile over the replays), `ratio` to the first
        contestant (median, 10th and 90th percentile over pairs of replays in one turn) and the findings of the check.
        A contestant that raised has only `absent`, the reason. A contestant with a wrong result has no time.
    """
    found: dict[str, dict[str, Any]] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    kept: dict[str, list[Any]] = {}
    is_chain = way in ("trigger", "norm")
    if is_chain:
        graphs[PREDECESSOR], _ = _capture(work, way, None)
    for contestant in contestants:
        try:
            graphs[contestant.name], kept[contestant.name] = _capture(work, way, contestant)
        except Exception as error:  # whatever a contestant raises is the finding
            torch.cuda.synchronize()  # raises if the device is lost; then this process cannot go on
            found[contestant.name] = {"absent": reason_of(error)}
    slow = {contestant.name for contestant in contestants if contestant.slow}
    times = _replay_in_turns(graphs, slow)
    if is_chain:
        alone = times.pop(PREDECESSOR)
        times = {name: {turn: us - alone[turn] for turn, us in column.items()} for name, column in times.items()}
        found[PREDECESSOR] = _summary(alone, work.calls)
    first = next(iter(times), None)
    for contestant in contestants:
        if contestant.name not in times:
            continue
        verdict = contestant.check(kept[contestant.name], work.order(way))
        column = times[contestant.name]
        timed = _summary(column, work.calls) if verdict["ok"] else {}
        if timed and first is not None and first == contestants[0].name:
            timed["ratio"] = _band([us / times[first][turn] for turn, us in column.items()])
        found[contestant.name] = {**timed, **verdict}
    names = [contestant.name for contestant in contestants] + [PREDECESSOR] * is_chain
    return {name: found[name] for name in names}


def calibrate(work: Workload) -> float:
    """Sets the cycles that `trigger` spins, so that the kernel lasts `PREDECESSOR_US`; returns its measured time."""
    predecessors = work.predecessors

    def alone() -> float:
        graph, _ = _capture(work, "trigger", None)
        return float(_summary(_replay_in_turns({"": graph}, set())[""], work.calls)["us"])

    predecessors.cycles = 2000
    low = alone()
    predecessors.cycles = 6000
    per_us = 4000 / max(alone() - low, 0.1)
    predecessors.cycles = max(0, int(2000 + (PREDECESSOR_US - low) * per_us))
    return alone()


def _capture(work: Workload, way: str, contestant: Contestant | None) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of all calls, and their results; without a contestant, a graph of the predecessors alone."""
    hidden = torch.empty_like(work.sources[0])

    def step(source: int, layer: int) -> Any:
        given = work.sources[source]
        if way in ("trigger", "norm"):
            work.predecessors.launch(way, given, hidden)
            given = hidden
        return None if contestant is None else contestant.call(layer, given)

    order = work.order(way)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for source, layer in order[:3] if contestant is not None and contestant.slow else order:
            step(source, layer)  # libraries and gates compile and allocate here, outside of the capture
        torch.cuda.synchronize()
        graph.capture_begin()  # not torch.cuda.graph(), which spends time on emptying the allocator's cache
        try:
            results = [step(source, layer) for source, layer in order]
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    results.append(hidden)  # the graph reads and writes this buffer, which must stay allocated
    return graph, results


def _replay_in_turns(graphs: dict[str, torch.cuda.CUDAGraph], slow: set[str]) -> dict[str, dict[int, float]]:
    """Microseconds of each graph's replays, by the number of the turn."""
    events: dict[str, dict[int, tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: {} for name in graphs}
    ahead = dict.fromkeys(graphs, 1e-3)
    for turn in range(-WARM_UP, REPLAYS):
        for name, graph in graphs.items():
            if name in slow and turn % 4:
                continue
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(int(ahead[name] * _CYCLES_PER_SECOND))
            start.record()
            began = time.perf_counter()
            graph.replay()
            if turn < 0:  # in the turns that count, the GPU sleeps twice the time that the host needs to enqueue
                ahead[name] = min(max(_LEAST_AHEAD, 2 * (time.perf_counter() - began)), 2e-3)
            end.record()
            if turn >= 0:
                events[name][turn] = start, end
    torch.cuda.synchronize()
    return {
        name: {turn: start.elapsed_time(end) * 1e3 for turn, (start, end) in pairs.items()}
        for name, pairs in events.items()
    }


def _summary(column: dict[int, float], calls: int) -> dict[str, Any]:
    us, low, high = _band([value / calls for value in column.values()])
    return {"us": us, "low": low, "high": high, "replays": len(column)}


def _band(values: list[float]) -> list[float]:
    """Median, 10th and 90th percentile."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return [round(statistics.median(values), 4), round(deciles[0], 4), round(deciles[-1], 4)]


def reason_of(error: BaseException) -> str:
    """An exception in one line; a NotImplementedError's message alone, since it says what is not supported."""
    message = " ".join(str(error).split())[:400]
    return message if isinstance(error, NotImplementedError) and message else f"{type(error).__name__}: {message}"
