"""Measures case after case in one process, and keeps the last case's layers and inputs for the next case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moegate.choice.candidates import CANDIDATES, Candidate
from moegate.choice.dispatch import Dispatch
from moegate.choice.machines import machine_of
from moegate.choice.plan import Plan
from moegate.measure import timing
from moegate.measure.checks import check_choice, check_routings
from moegate.measure.layers import Layers, Stage, gpu
from moegate.measure.names import NOT_FROZEN
from moegate.measure.timing import Workload, calibrate
from moegate.problem import Problem, dtypes_of
from moegate.spec import RouterSpec

Peers = Callable[[Stage], "list[timing.Contestant]"]


class Stages:
    """The layers and inputs of the last case, and the calibration of the predecessor."""

    def __init__(self) -> None:
        self._layers: Layers | None = None
        self._stage: tuple[int, Stage] | None = None
        self._cycles: int | None = None

    def layers(self, spec: RouterSpec) -> Layers:
        """The layers of a spec; those of another spec are freed."""
        if self._layers is None or self._layers.spec != spec:
            self._stage = self._layers = None  # frees the memory before more is allocated
            torch._dynamo.reset()
            self._layers = Layers(spec)
        return self._layers

    def stage(self, spec: RouterSpec, tokens: int) -> Stage:
        """The layers of a spec with inputs of M tokens."""
        layers = self.layers(spec)
        if self._stage is None or self._stage[0] != tokens:
            self._stage = None
            torch.cuda.empty_cache()  # the pools of the last stage's graphs
            self._stage = tokens, Stage.of(layers, tokens)
        return self._stage[1]

    def workload(self, sources: list[torch.Tensor], layers: int, calls: int) -> Workload:
        """A workload of `calls` calls, with the predecessor calibrated; the calibration runs once a process."""
        if self._cycles is None:
            small = Workload([torch.zeros(1, 7168, dtype=torch.bfloat16, device=gpu())] * 2, 1, timing.LAYERS)
            calibrate(small)
            self._cycles = small.predecessors.cycles
        work = Workload(sources, layers, calls)
        work.predecessors.cycles = self._cycles
        return work


class Session:
    """Measures cases on the current GPU. Consecutive cases with one spec share layers, which saves time."""

    def __init__(self) -> None:
        self.machine = machine_of(gpu())
        self._stages = Stages()

    def measure(self, spec: RouterSpec, tokens: int, way: str, more: Peers | None = None) -> dict[str, dict[str, Any]]:
        """Times every candidate of `CANDIDATES`; those of the cuda backend once frozen and once not frozen.

        Args:
            spec: The router, which gets random weights.
            tokens: M, at least 1.
            way: "cold", "hot", or in a chain behind the predecessor "trigger" or "norm".
            more: Makes further contestants for a stage; ratios are to the first of these. None: no others.

        Returns:
            What `timing.measure` returns, by name: a candidate's key, with `NOT_FROZEN` appended for gates that are not
            frozen. A candidate that cannot run has `absent`, the reason.
        """
        stage = self._stages.stage(spec, tokens)
        dtypes = dtypes_of(spec, stage.layers.weights[0].dtype, stage.layers.tensors)
        problem = Problem(self.machine, spec, dtypes)
        contestants = [] if more is None else more(stage)
        absent: dict[str, dict[str, Any]] = {}
        for candidate in CANDIDATES:
            key = candidate.key(problem)
            reason = candidate.unsupported(problem, tokens) or candidate.try_out(problem, gpu())
            if reason is None:
                contestants.append(_timed(candidate, problem, stage, key))
                if candidate.backend == "cuda":
                    contestants.append(_timed(candidate, problem._replace(frozen=False), stage, key + NOT_FROZEN))
            else:
                absent[key] = {"absent": reason}
        work = self._stages.workload(stage.sources, len(stage.layers.weights), stage.calls)
        return timing.measure(work, way, contestants) | absent


def _timed(candidate: Candidate, problem: Problem, stage: Stage, name: str) -> timing.Contestant:
    """A candidate as a contestant, with one weight a layer."""
    dispatch = Dispatch(Plan(problem), only=candidate)
    weights, tensors, ids = stage.layers.weights, stage.layers.tensors, stage.input_ids
    prepared = [dispatch.prepare(weight, tensors) for weight in weights]

    def call(layer: int, hidden: torch.Tensor) -> Any:
        return dispatch.route(hidden, weights[layer], tensors, ids, prepared[layer]).without_logits()

    keeps_contract = candidate.backend != "flashinfer"
    check = check_routings(stage.expected) if keeps_contract else check_choice(stage.expected)
    return timing.Contestant(name, call, check, slow=candidate.backend == "torch")
