"""The parts of the benchmark that are timed in CUDA graphs: the cases of each, and their contestants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import moegate
from moegate import catalog
from moegate.choice.dispatch import Options as GateOptions
from moegate.choice.dispatch import for_gemm
from moegate.measure import peers
from moegate.measure.checks import Reference, check_choice, check_logits, check_nothing, check_routings
from moegate.measure.layers import Stage
from moegate.measure.names import DEFAULT, DEFAULT_NOT_FROZEN, FLOOR, NO_PDL
from moegate.measure.session import Stages
from moegate.measure.timing import Contestant, measure
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec

Key = tuple[str, int, str]
"""Model, tokens, way."""

_SMALL = (1, 2, 4, 8, 16, 32, 64)
_PREFILL = (128, 512, 1024, 4096, 16384)
_FLOAT32_SHAPES = {"3072x256 float32": (3072, 256), "6144x128 float32": (6144, 128)}


def keys(part: str) -> list[Key]:
    """The cases of a part, ordered so that consecutive cases share layers and inputs."""
    if part == "gemm":
        return [("7168x256", m, way) for m in _SMALL for way in ("cold", "hot", "trigger")]
    if part == "route":
        ways, tokens = ("trigger", "cold", "hot", "norm"), (*range(1, 17), 32, 64)
        return [("deepseek-v3", m, way) for m in tokens for way in ways if way == "trigger" or m in _SMALL]
    if part == "catalog":
        return [(name, m, "trigger") for name in catalog_models() for m in _SMALL]
    if part == "fp32":
        return [(name, m, way) for name in _FLOAT32_SHAPES for m in _SMALL[:-1] for way in ("cold", "trigger")]
    if part == "select":
        short = [(name, m, way) for name in _SELECT for m in _SMALL for way in ("hot", "trigger")]
        return short + [(name, m, "hot") for name in _SELECT for m in _PREFILL[2:]]
    assert part == "prefill", part
    return [(name, m, "cold") for name in ("deepseek-v3", "gpt-oss-120b", "minimax-m2") for m in _PREFILL]


def catalog_models() -> list[str]:
    """The first name of each different router."""
    first: dict[RouterSpec, str] = {}
    for model in catalog.models():
        first.setdefault(model.spec, model.name)
    return list(first.values())


_SELECT = {"deepseek-v3": "256 experts, 4 of 8 groups", "kimi-k2": "384 experts, no groups"}


@dataclass
class Options:
    """Options of the command line that decide on contestants."""

    compile_catalog: bool = False


class Bench:
    """Measures cases. Consecutive cases with one spec share layers, which saves time."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._stages = Stages()

    def measure(self, part: str, key: Key) -> dict[str, Any]:
        """The content of one row."""
        model, tokens, way = key
        makers: dict[str, Callable[[str, int], list[Contestant]]] = {
            "gemm": self._gemm,
            "fp32": self._gemm,
            "route": self._route,
            "prefill": self._prefill,
            "catalog": self._catalog,
        }
        if part == "select":
            return self._measure_select(model, tokens, way)
        contestants = makers[part](model, tokens)
        stage = self._stage_of(model, tokens)
        work = self._stages.workload(stage.sources, len(stage.layers.weights), stage.calls)
        found = measure(work, way, contestants)
        rotation_mb = round(stage.layers.rotation_bytes / 1e6, 1)
        content: dict[str, Any] = {"calls": stage.calls, "rotation_mb": rotation_mb, "contestants": found}
        gates = stage.layers.gates(DEFAULT, frozen=True) if part in ("route", "catalog", "prefill") else ""
        if not isinstance(gates, str):
            plan = gates[0].explain(tokens)
            content["kernel"] = f"{plan.backend} {plan.kernel}"
        return content

    def _stage_of(self, model: str, tokens: int) -> Stage:
        return self._stages.stage(_spec(model), tokens)

    def _route(self, model: str, tokens: int) -> list[Contestant]:
        stage = self._stage_of(model, tokens)
        slow = [stage.compiled(), stage.eager()] if tokens in _SMALL else []
        return [
            *_gates_of(stage),
            stage.ours(NO_PDL, frozen=True, pdl=False),
            stage.flashinfer_pair(),
            stage.cublas(may_compile=True),
            *slow,
            stage.floor(),
        ]

    def _prefill(self, model: str, tokens: int) -> list[Contestant]:
        stage = self._stage_of(model, tokens)
        peers = [stage.cublas(may_compile=True), stage.compiled(), stage.eager()]
        return [*_gates_of(stage), *peers, stage.floor()]

    def _catalog(self, model: str, tokens: int) -> list[Contestant]:
        stage = self._stage_of(model, tokens)
        found = [*_gates_of(stage), stage.flashinfer_pair()]
        found += [stage.cublas(may_compile=self._options.compile_catalog), stage.floor()]
        if peers.is_transformers_softmax(stage.layers.spec):
            found.append(stage.transformers())
        return found + [stage.compiled()] * self._options.compile_catalog

    def _gemm(self, model: str, tokens: int) -> list[Contestant]:
        """The GEMM alone, checked by the contract's bound on float32 logits."""
        stage = self._stage_of(model, tokens)
        spec, weights, check = stage.layers.spec, stage.layers.weights, check_logits(stage.expected)
        is_float32 = weights[0].dtype == torch.float32
        gemm: Any = "FlashInfer has no float32 weights"
        if not is_float32:
            gemm = peers.flashinfer_gemm(spec, stage.layers.device, tokens)

        def flashinfer(layer: int, hidden: Tensor) -> Tensor:
            if isinstance(gemm, str):
                raise NotImplementedError(gemm)
            return gemm(hidden, weights[layer])  # type: ignore[no-any-return]

        def cublas(layer: int, hidden: Tensor) -> Tensor:
            if is_float32:
                return F.linear(hidden.float(), weights[layer])
            return torch.mm(hidden, weights[layer].t(), out_dtype=torch.float32)

        def ours(layer: int, hidden: Tensor) -> Tensor:
            return moegate.router_gemm(hidden, weights[layer])

        dispatch = for_gemm(stage.layers.device, weights[0], None, torch.float32, GateOptions(frozen=True))

        def frozen(layer: int, hidden: Tensor) -> Tensor:
            return dispatch.router_gemm(hidden, weights[layer], RouterTensors(), {})

        peer = "F.linear float32" if is_float32 else "torch.mm(out_dtype=float32)"
        contestants = [
            Contestant(DEFAULT, frozen, check),
            Contestant("moegate.router_gemm", ours, check),
            Contestant(peer, cublas, check),
        ]
        if not is_float32:
            contestants.append(Contestant("FlashInfer GEMM", flashinfer, check))
        return [*contestants, replace(stage.floor(), name=FLOOR, check=check_nothing)]

    def _measure_select(self, model: str, tokens: int, way: str) -> dict[str, Any]:
        """The selection alone, on given float32 logits."""
        spec = _spec(model)
        layers = self._stages.layers(spec)
        tensors, device = layers.tensors, layers.device
        generator = torch.Generator(device).manual_seed(tokens)
        shape = (tokens, spec.num_gate_rows)
        sources = [torch.randn(shape, generator=generator, device=device) for _ in range(2)]
        calls = 58 if tokens < 4096 else 16
        expected = _GivenLogits(spec, tensors, [], sources, calls)
        bias = tensors.e_score_correction_bias

        def ours(layer: int, logits: Tensor) -> Any:
            return moegate.select(logits, spec, e_score_correction_bias=bias)

        top_k: Any = peers.flashinfer_top_k(spec, tensors)

        def flashinfer(layer: int, logits: Tensor) -> Any:
            if isinstance(top_k, str):
                raise NotImplementedError(top_k)
            return top_k(logits)

        contestants = [
            Contestant("moegate.select", ours, check_routings(expected)),
            Contestant("FlashInfer fused_topk_deepseek", flashinfer, check_choice(expected)),
        ]
        found = measure(self._stages.workload(sources, 1, calls), way, contestants)
        return {"calls": calls, "what": _SELECT[model], "contestants": found}


def _gates_of(stage: Stage) -> list[Contestant]:
    return [stage.ours(DEFAULT, frozen=True), stage.ours(DEFAULT_NOT_FROZEN, frozen=False)]


class _GivenLogits(Reference):
    """A reference whose sources are logits, in place of hidden states."""

    def _of(self, source: int, layer: int) -> tuple[Tensor, Tensor]:
        exact = self._sources[source][self.rows].double()
        return exact, torch.zeros_like(exact)


def _spec(model: str) -> RouterSpec:
    if model in _FLOAT32_SHAPES:
        hidden_size, experts = _FLOAT32_SHAPES[model]
        return RouterSpec(hidden_size=hidden_size, num_experts=experts, top_k=8, weight_dtype="float32")
    if model == "7168x256":
        return RouterSpec(hidden_size=7168, num_experts=256, top_k=8)
    return catalog.get_spec(model)
