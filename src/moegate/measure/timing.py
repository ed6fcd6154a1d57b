"""Graphs of many calls, replayed in turns: the time of a call with its noise."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moegate.measure.cuda_kernels import PREDECESSOR_US, Predecessors

WARM_UP, REPLAYS = 10, 30
MAX_CALLS, LAYERS = 256, 58  # DeepSeek-V3 has 58 routers
ROTATION_BYTES = 128e6  # an H200's L2 holds 60 MB
_CYCLES_PER_SECOND = 2e9
_LEAST_AHEAD = 100e-6  # seconds in which the GPU sleeps while the host enqueues a replay, so that none waits for it
_PREDECESSOR_ALONE = "predecessor alone"


@dataclass
class Contestant:
    """One way to do the work, and how to judge what came out."""

    name: str
    call: Callable[[int, Tensor], Any]
    """(layer, hidden) -> the result, in memory of its own."""
    check: Callable[[list[Any], Sequence[tuple[int, int]]], dict[str, Any]]
    """Results of all calls and their (source, layer) -> {"ok": ..., findings}."""
    slow: bool = False
    """Takes part in every fourth replay only."""


@dataclass
class Workload:
    """What the calls of a graph go through: two hidden states in turn, so that a stale read shows, and the layers."""

    sources: list[Tensor]
    layers: int
    calls: int
    predecessors: Predecessors = field(default_factory=Predecessors)

    def order(self, way: str) -> list[tuple[int, int]]:
        """(source, layer) of each call."""
        return [(i % 2, 0 if way == "hot" else i % self.layers) for i in range(self.calls)]


def layer_count(weight_bytes: int, fewest: int = LAYERS) -> int:
    """How many weights in turn are more than L2 holds; at most `MAX_CALLS`."""
    return min(MAX_CALLS, max(fewest, int(ROTATION_BYTES // weight_bytes) + 1))


def measure(work: Workload, way: str, candidates: list[Contestant]) -> dict[str, dict[str, Any]]:
    """Times the candidates in one way: "cold", "hot", or in a chain behind the predecessor "trigger" or "norm".

    Returns:
        By name `us` (median), `low` and `high` (10th and 90th percentile of the replays), `ratio` to the first
        candidate (of replays side by side, with its band) and the findings of the check. A candidate that raised has
        `absent`, the reason, instead; one with a wrong result no time.
    """
    found: dict[str, dict[str, Any]] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    kept: dict[str, list[Any]] = {}
    is_chain = way in ("trigger", "norm")
    if is_chain:
        graphs[_PREDECESSOR_ALONE], _ = _capture(work, way, None)
    for candidate in candidates:
        try:
            graphs[candidate.name], kept[candidate.name] = _capture(work, way, candidate)
        except Exception as error:  # of a peer as of ours: what it raised is the finding
            torch.cuda.synchronize()  # raises if the device is lost, and with it this process
            found[candidate.name] = {"absent": reason_of(error)}
    slow = {candidate.name for candidate in candidates if candidate.slow}
    times = _replay_in_turns(graphs, slow)
    if is_chain:
        alone = times.pop(_PREDECESSOR_ALONE)
        times = {name: {r: us - alone[r] for r, us in column.items()} for name, column in times.items()}
        found[_PREDECESSOR_ALONE] = _summary(alone, work.calls)
    first = next(iter(times), None)
    for candidate in candidates:
        if candidate.name not in times:
            continue
        verdict = candidate.check(kept[candidate.name], work.order(way))
        column = times[candidate.name]
        timed = _summary(column, work.calls) if verdict["ok"] else {}
        if timed and first is not None and first == candidates[0].name:
            timed["ratio"] = _band([us / times[first][r] for r, us in column.items()])
        found[candidate.name] = {**timed, **verdict}
    names = [candidate.name for candidate in candidates] + [_PREDECESSOR_ALONE] * is_chain
    return {name: found[name] for name in names}


def calibrate(work: Workload) -> float:
    """Sets how long `trigger` spins, so that it takes `PREDECESSOR_US`; returns what it takes then."""
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


def _capture(work: Workload, way: str, candidate: Contestant | None) -> tuple[torch.cuda.CUDAGraph, list[Any]]:
    """A graph of all calls, and their results; without a candidate, of the predecessors alone."""
    hidden = torch.empty_like(work.sources[0])

    def step(source: int, layer: int) -> Any:
        given = work.sources[source]
        if way in ("trigger", "norm"):
            work.predecessors.launch(way, given, hidden)
            given = hidden
        return None if candidate is None else candidate.call(layer, given)

    order = work.order(way)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for source, layer in order[:3] if candidate is not None and candidate.slow else order:
            step(source, layer)  # compiles, and lets libraries and gates allocate, outside of the capture
        torch.cuda.synchronize()
        graph.capture_begin()  # torch.cuda.graph() empties the cache of the allocator first, which takes longer
        try:
            results = [step(source, layer) for source, layer in order]
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    results.append(hidden)  # the graph reads it
    return graph, results


def _replay_in_turns(graphs: dict[str, torch.cuda.CUDAGraph], slow: set[str]) -> dict[str, dict[int, float]]:
    """Microseconds of each candidate's replays, by the number of the turn."""
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
            if turn < 0:  # twice what it takes the host, so that it is ahead in the replays that count
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
    """An exception in one line; what is not supported says so itself."""
    message = " ".join(str(error).split())[:400]
    return message if isinstance(error, NotImplementedError) and message else f"{type(error).__name__}: {message}"
