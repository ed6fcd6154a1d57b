"""One process that measures case after case: the layers and the inputs of the last case stay for the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from moegate.backends.flashinfer import FlashInferRouter
from moegate.choice.candidates import CANDIDATES, Candidate
from moegate.choice.facts import Facts, default_weight_dtype, facts_of, machine_of
from moegate.choice.planned import router_of
from moegate.measure import timing
from moegate.measure.checks import check_choice, check_routings
from moegate.measure.layers import Layers, Stage, gpu
from moegate.measure.names import NOT_FROZEN
from moegate.measure.timing import Workload, calibrate
from moegate.spec import RouterSpec

Peers = Callable[[Stage], "list[timing.Candidate]"]


class Stages:
    """What cases are measured on: the layers and the inputs of the last one, and how long a predecessor spins."""

    def __init__(self) -> None:
        self._layers: Layers | None = None
        self._stage: tuple[int, Stage] | None = None
        self._cycles: int | None = None

    def layers(self, spec: RouterSpec) -> Layers:
        """Weights for the spec."""
        if self._layers is None or self._layers.spec != spec:
            self._stage = self._layers = None  # frees the memory first
            torch._dynamo.reset()
            self._layers = Layers(spec)
        return self._layers

    def stage(self, spec: RouterSpec, tokens: int) -> Stage:
        """The layers with M tokens."""
        layers = self.layers(spec)
        if self._stage is None or self._stage[0] != tokens:
            self._stage = None
            torch.cuda.empty_cache()  # the pools of the last stage's graphs
            self._stage = tokens, Stage.of(layers, tokens)
        return self._stage[1]

    def workload(self, sources: list[torch.Tensor], layers: int, calls: int) -> Workload:
        """So many calls on these inputs, behind predecessors that are calibrated once a process."""
        if self._cycles is None:  # on this GPU at its clock
            small = Workload([torch.zeros(1, 7168, dtype=torch.bfloat16, device=gpu())] * 2, 1, timing.LAYERS)
            calibrate(small)
            self._cycles = small.predecessors.cycles
        work = Workload(sources, layers, calls)
        work.predecessors.cycles = self._cycles
        return work


class Session:
    """Measures cases on the current GPU; those that share a spec belong one behind the other."""

    def __init__(self) -> None:
        self.machine = machine_of(gpu())
        self._stages = Stages()

    def measure(self, spec: RouterSpec, tokens: int, way: str, more: Peers | None = None) -> dict[str, dict[str, Any]]:
        """By candidate's key, what `timing.measure` found; `absent` for those of `CANDIDATES` that cannot run.

        Those of the cuda backend twice: with frozen gates, and with `NOT_FROZEN` behind the key.

        Args:
            spec: What is routed, with random weights.
            tokens: M, at least 1.
            way: "cold", "hot", or in a chain behind the predecessor "trigger" or "norm".
            more: Further candidates for a stage; the first of them is what ratios are to. None: no others.
        """
        stage = self._stages.stage(spec, tokens)
        facts = facts_of(self.machine, spec, default_weight_dtype(spec))
        candidates = [] if more is None else more(stage)
        absent: dict[str, dict[str, Any]] = {}
        for candidate in CANDIDATES:
            reason = candidate.supports(facts, tokens) or self._fails(candidate, facts)
            if reason is None:
                candidates.append(_timed(candidate, facts, stage, candidate.key(facts)))
                if candidate.backend == "cuda":
                    not_frozen = replace(facts, frozen=False)
                    candidates.append(_timed(candidate, not_frozen, stage, candidate.key(facts) + NOT_FROZEN))
            else:
                absent[candidate.key(facts)] = {"absent": reason}
        work = self._stages.workload(stage.sources, len(stage.layers.weights), stage.calls)
        return timing.measure(work, way, candidates) | absent

    def _fails(self, candidate: Candidate, facts: Facts) -> str | None:
        router = router_of(candidate, facts)
        return router.try_out(facts.spec, gpu()) if isinstance(router, FlashInferRouter) else None


def _timed(candidate: Candidate, facts: Facts, stage: Stage, name: str) -> timing.Candidate:
    """A candidate of the plan as one to be timed: each layer its own weight."""
    router, spec = router_of(candidate, facts), facts.spec
    weights, tensors, ids = stage.layers.weights, stage.layers.tensors, stage.input_ids
    prepared = [router.prepare(weight, spec, tensors, frozen=facts.frozen, pdl=True) for weight in weights]

    def call(layer: int, hidden: torch.Tensor) -> Any:
        return router.route(hidden, weights[layer], spec, tensors, ids, prepared[layer]).without_logits()

    keeps = candidate.backend != "flashinfer"
    check = check_routings(stage.expected) if keeps else check_choice(stage.expected)
    return timing.Candidate(name, call, check, slow=candidate.backend == "torch")
