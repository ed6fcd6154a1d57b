"""The measurements of `moegate bench`: the default plan, every candidate and every peer in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moegate.choice.candidates import CANDIDATES
from moegate.choice.explain import explain
from moegate.choice.plan import Plan
from moegate.flashinfer import limits
from moegate.measure import timing
from moegate.measure.checks import Calls, check_choice
from moegate.measure.layers import Stage
from moegate.measure.names import DEFAULT, DEFAULT_NOT_FROZEN, NOT_FROZEN, TRANSFORMERS
from moegate.measure.record import Record
from moegate.measure.session import Session
from moegate.measure.transformers_router import TransformersRouter, transformers_router
from moegate.problem import default_weight_dtype, problem_of
from moegate.spec import RouterSpec

SOURCES = ("deepseek-v3", "kimi-k2", "qwen3-30b-a3b", "gpt-oss-120b")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
WAYS = ("trigger", "cold", "hot")
PART = "bench"


@dataclass(frozen=True)
class Source:
    """A model whose router is measured."""

    title: str
    spec: RouterSpec
    config: dict[str, Any]
    """The part of the model's config.json that Transformers' router is built from."""


Case = tuple[Source, int, str]


def cases(sources: Sequence[Source], tokens: Sequence[int], ways: Sequence[str]) -> list[Case]:
    """All cases, ordered so that consecutive cases share layers and inputs."""
    return [(source, count, way) for source in sources for count in tokens for way in ways]


def record_in(folder: Path, run: dict[str, Any]) -> Record:
    """The record FOLDER/bench.json; rows of earlier runs are kept."""
    return Record(folder, PART, run)


def measure_case(session: Session, source: Source, tokens: int, way: str) -> dict[str, Any]:
    """The content of a row: findings on every contestant, the plan's choice, the candidates that keep the contract."""
    spec = source.spec
    problem = problem_of(session.machine, spec, default_weight_dtype(spec))
    found = session.measure(spec, tokens, way, lambda stage: _peers(stage, source))
    explanation = explain(Plan(problem), tokens)
    not_frozen = Plan(problem._replace(frozen=False)).choice(tokens).candidate
    return {
        "hidden_size": spec.hidden_size,
        "gate_rows": spec.num_gate_rows,
        "top_k": spec.top_k,
        "plan": f"{explanation.backend}:{explanation.kernel}",
        "plan_not_frozen": not_frozen.key(problem) + NOT_FROZEN,
        "expected_us": explanation.expected_us,
        "evidence": explanation.evidence,
        "keeps_contract": [each.key(problem) for each in CANDIDATES if each.breaks(problem, tokens) is None],
        "contestants": found,
    }


def _peers(stage: Stage, source: Source) -> list[timing.Contestant]:
    found = [stage.ours(DEFAULT, frozen=True), stage.ours(DEFAULT_NOT_FROZEN, frozen=False), stage.compiled()]
    if limits.top_k_refuses(source.spec) is not None:  # otherwise FlashInfer's top-k behind cuBLAS is a candidate
        found.append(stage.cublas(may_compile=True))
    return [*found, _transformers(stage, source), stage.floor()]


def _transformers(stage: Stage, source: Source) -> timing.Contestant:
    weights, made = stage.layers.weights, list[TransformersRouter]()

    def call(layer: int, hidden: Any) -> Any:
        if not made:
            made.append(transformers_router(source.config, stage.layers.tensors, stage.layers.device))
        return made[0].route(hidden, weights[layer])

    def check(results: list[Any], order: Calls) -> dict[str, Any]:
        # Not in the timed call: in the model, another kernel applies the factor.
        scaled = [(ids, weights * made[0].output_factor) for ids, weights in results[: len(order)]]
        return check_choice(stage.expected)(scaled, order)

    return timing.Contestant(TRANSFORMERS, call, check, slow=True)
