"""The routers of a model's layers on the GPU, and the contestants that compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moegate.choice.dispatch import Options, for_route
from moegate.flashinfer import limits
from moegate.gate import Gate
from moegate.measure import peers
from moegate.measure.checks import Reference, check_choice, check_nothing, check_routings
from moegate.measure.cuda_kernels import read_floor
from moegate.measure.names import COMPILED, EAGER, FLOOR, PAIR, TRANSFORMERS_OPS
from moegate.measure.plain import compiled, plain_logits, plain_route, plain_select
from moegate.measure.timing import Contestant, layer_count, reason_of
from moegate.spec import RouterSpec
from moegate.synthetic import VOCABULARY, random_tensors


def gpu() -> torch.device:
    """The current CUDA device, with its index."""
    return torch.device("cuda", torch.cuda.current_device())


class Layers:
    """A different weight for each layer, together more than L2 holds, and one set of the small tensors for all."""

    def __init__(self, spec: RouterSpec) -> None:
        device = gpu()
        self.spec, self.device = spec, device
        first, self.tensors = random_tensors(spec, device=device)
        count = layer_count(first.numel() * first.element_size())
        generator = torch.Generator(device).manual_seed(1)
        std = float(first.float().std())
        self.weights = [first] + [self._weight(first, std, generator) for _ in range(count - 1)]
        self._gates: dict[str, list[Gate] | str] = {}
        self._compiled: dict[str, Callable[..., Any]] = {}

    @staticmethod
    def _weight(like: Tensor, std: float, generator: torch.Generator) -> Tensor:
        return (torch.randn(like.shape, generator=generator, device=like.device) * std).to(like.dtype)

    @property
    def rotation_bytes(self) -> int:
        """Bytes of all layers' weights."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights)

    def gates(self, name: str, **options: Any) -> list[Gate] | str:
        """One gate a layer, made at the first call with this name; or the reason why there are none."""
        if name not in self._gates:
            given = {key: value for key, value in self.tensors._asdict().items() if value is not None}
            try:
                self._gates[name] = [Gate(self.spec, weight, **given, **options) for weight in self.weights]
            except Exception as error:  # also a TypeError: an older moegate lacks the keyword
                torch.cuda.synchronize()
                self._gates[name] = reason_of(error)
        return self._gates[name]

    def compiled(self, name: str, make: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        """A compiled function, kept for all numbers of tokens as in an engine."""
        if name not in self._compiled:
            self._compiled[name] = compiled(make())
        return self._compiled[name]


@dataclass
class Stage:
    """The layers of one model with inputs of M tokens."""

    layers: Layers
    sources: list[Tensor]
    input_ids: Tensor | None
    expected: Reference
    calls: int

    @classmethod
    def of(cls, layers: Layers, tokens: int) -> Stage:
        """Draws two batches of M hidden states on the GPU, with their float64 reference."""
        spec, device = layers.spec, layers.device
        generator = torch.Generator(device).manual_seed(tokens)
        shape = (tokens, spec.hidden_size)
        sources = [torch.randn(shape, generator=generator, device=device).to(torch.bfloat16) for _ in range(2)]
        ids = None
        if spec.hash_routing:
            ids = torch.randint(VOCABULARY, (tokens,), generator=generator, device=device)
        calls = len(layers.weights) if tokens < 4096 else 16
        expected = Reference(spec, layers.tensors, layers.weights, sources, calls, ids)
        return cls(layers, sources, ids, expected, calls)

    def ours(self, name: str, **options: Any) -> Contestant:
        """Gates of moegate, made with these options."""
        gates, ids = self.layers.gates(name, **options), self.input_ids

        def call(layer: int, hidden: Tensor) -> Any:
            if isinstance(gates, str):
                raise RuntimeError(gates)
            return gates[layer](hidden, input_ids=ids)

        return Contestant(name, call, check_routings(self.expected))

    def flashinfer_pair(self) -> Contestant:
        """FlashInfer's GEMM and its top-k."""
        spec, weights = self.layers.spec, self.layers.weights
        refused = limits.gemm_refuses(spec, weights[0].dtype)
        gemm: Any = f"not supported: {refused}"
        if refused is None:
            gemm = peers.flashinfer_gemm(spec, self.layers.device, self.sources[0].shape[0])
        top_k = peers.flashinfer_top_k(spec, self.layers.tensors)

        def call(layer: int, hidden: Tensor) -> Any:
            for half in (gemm, top_k):
                if isinstance(half, str):
                    raise NotImplementedError(half)
            return top_k(gemm(hidden, weights[layer]))  # type: ignore[operator]

        return Contestant(PAIR, call, check_choice(self.expected))

    def cublas(self, *, may_compile: bool) -> Contestant:
        """The GEMM of cuBLAS, then the fastest peer's selection that supports the spec."""
        spec, tensors = self.layers.spec, self.layers.tensors
        weights, gemm = self.layers.weights, plain_logits(spec, tensors)
        top_k: Any = peers.flashinfer_top_k(spec, tensors)
        name = "FlashInfer top-k"
        if isinstance(top_k, str):
            name = "compiled top-k" if may_compile else "eager top-k"
            top_k = plain_select(spec, tensors, self.input_ids)
            if may_compile and not spec.hash_routing:
                top_k = self.layers.compiled("select", lambda: plain_select(spec, tensors, None))

        def call(layer: int, hidden: Tensor) -> Any:
            return top_k(gemm(hidden, weights[layer]))

        return Contestant(f"cuBLAS + {name}", call, check_choice(self.expected), slow=name == "eager top-k")

    def compiled(self) -> Contestant:
        """The route of measure/plain.py through torch.compile."""
        spec, tensors, ids, weights = self.layers.spec, self.layers.tensors, self.input_ids, self.layers.weights

        def call(layer: int, hidden: Tensor) -> Any:
            if spec.hash_routing:
                raise NotImplementedError("not measured: the token ids are part of the compiled function")
            route = self.layers.compiled("route", lambda: plain_route(spec, tensors, ids))
            return route(hidden, weights[layer])

        return Contestant(COMPILED, call, check_choice(self.expected))

    def eager(self) -> Contestant:
        """The torch backend of moegate: eager operations that keep the contract."""
        spec, tensors, ids, weights = self.layers.spec, self.layers.tensors, self.input_ids, self.layers.weights
        dispatch = for_route(self.layers.device, spec, weights[0], tensors, Options(backend="torch"))

        def call(layer: int, hidden: Tensor) -> Any:
            return dispatch.route(hidden, weights[layer], tensors, ids, {}).without_logits()

        return Contestant(EAGER, call, check_routings(self.expected), slow=True)

    def transformers(self) -> Contestant:
        """The operations of Transformers' softmax routers."""
        spec, weights = self.layers.spec, self.layers.weights
        route = peers.transformers_like(spec, self.layers.tensors.bias)

        def call(layer: int, hidden: Tensor) -> Any:
            return route(hidden, weights[layer])

        return Contestant(TRANSFORMERS_OPS, call, check_choice(self.expected), slow=True)

    def floor(self) -> Contestant:
        """Reads the weight and the hidden states once, and computes nothing."""
        weights = self.layers.weights
        blocks = torch.cuda.get_device_properties(self.layers.device).multi_processor_count

        def call(layer: int, hidden: Tensor) -> Any:
            return read_floor(weights[layer], hidden, blocks)

        return Contestant(FLOOR, call, check_nothing)
