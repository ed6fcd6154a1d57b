"""A plan made to run: the one place where the number of tokens decides which candidate a call runs."""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moegate.choice import costs, policies, tables
from moegate.choice.by_tokens import ByTokens, NoTokens, by_tokens
from moegate.choice.candidates import Candidate
from moegate.choice.machines import machine_of
from moegate.choice.plan import Plan, Span, warn_of_slow_paths
from moegate.cuda import device as gpu
from moegate.halves import BoundGemm, BoundSelection, Call, Half, Prepared
from moegate.problem import Dtypes, Problem, default_weight_dtype, dtypes_of
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec
from moegate.spec_values import LogitsDtype

_log = logging.getLogger("moegate")
_SECONDS_OF_COMPILING = 0.1  # kernels that the cache has are loaded in some milliseconds


class Dispatch:
    """The halves of a plan's candidates, bound to a device. It holds no tensor: each call brings its own.

    Args:
        plan: For the dtypes that calls most likely bring; those of other calls are bound when they come.
        only: This candidate runs at every number of tokens; None: those of the plan.
    """

    def __init__(self, plan: Plan, only: Candidate | None = None) -> None:
        device = plan.problem.machine.device
        assert device is not None
        self.plan, self._device, self._only = plan, device, only
        self._candidates = plan.candidates if only is None else (only,)
        # PyTorch's operations accept wrappers, too, and find their device by themselves.
        self._is_torch = {candidate.backend for candidate in self._candidates} == {"torch"}
        self._index = device.index or 0 if device.type == "cuda" and not self._is_torch else None
        self._by_half: dict[tuple[Any, ...], ByTokens[Any]] = {}
        self._prepared: set[Half] = set()

    @property
    def name(self) -> str:
        """The backends that take part."""
        return "+".join(dict.fromkeys(candidate.backend for candidate in self._candidates))

    def prepare(self, weight: Tensor, tensors: RouterTensors, half: Half = "both") -> Prepared:
        """Compiles and loads for likely calls of a module; returns what is made once of a frozen weight."""
        problem = self.plan.problem
        if half not in self._prepared:
            bound = self._bind(*_key(half, problem.dtypes.hidden, problem.dtypes.input_ids, None))
            if self._index is not None:
                self._run_gemms(bound, weight, tensors)
            self._prepared.add(half)
        if not problem.frozen:
            return {}
        made = {each.gemm: each.gemm.prepare(problem, weight) for each in self._candidates}
        return {gemm: prepared for gemm, prepared in made.items() if prepared is not None}

    def _run_gemms(self, by_number: ByTokens[Any], weight: Tensor, tensors: RouterTensors) -> None:
        """Runs each GEMM once: the first use of cuBLAS takes tens of milliseconds, which no call shall wait for."""
        hidden_dtype = self.plan.problem.dtypes.hidden
        with torch.cuda.device(self._device):
            stream = gpu.current_stream(self._device.index or 0)
            for last, bound in zip(by_number.ends, by_number.bound[1:], strict=True):
                if bound is None:
                    continue
                hidden = torch.zeros((last + 1, weight.shape[1]), dtype=hidden_dtype, device=self._device)
                call = Call(last + 1, hidden, weight, tensors, None, None, {}, None, stream)
                if isinstance(bound, tuple):
                    bound[0](call)
                else:
                    bound.logits(call)

    def route(
        self,
        hidden: Tensor,
        weight: Tensor,
        tensors: RouterTensors,
        input_ids: Tensor | None,
        prepared: Prepared,
        out: Routing | None = None,
        padding: Tensor | None = None,
    ) -> Routing:
        """Hidden states [M, K] -> routing, with its logits; in `out`, if that is given. See `moegate.route`."""
        index, stream = self._index, 0
        if index is not None:
            if gpu.current_device() != index:
                with torch.cuda.device(index):
                    return self.route(hidden, weight, tensors, input_ids, prepared, out, padding)
            stream = gpu.current_stream(index)
        num_tokens = hidden.shape[0]
        gemm, select = self._at("both", num_tokens, hidden.dtype, input_ids, padding)
        call = tuple.__new__(Call, (num_tokens, hidden, weight, tensors, input_ids, padding, prepared, out, stream))
        routing: Routing = select(call, gemm(call))
        return routing

    def router_gemm(self, hidden: Tensor, weight: Tensor, tensors: RouterTensors, prepared: Prepared) -> Tensor:
        """Hidden states [M, K] -> logits [M, R]. See `moegate.router_gemm`."""
        index = self._index
        if index is not None and gpu.current_device() != index:
            with torch.cuda.device(index):
                return self.router_gemm(hidden, weight, tensors, prepared)
        stream = 0 if index is None else gpu.current_stream(index)
        gemm = self._at("gemm", hidden.shape[0], hidden.dtype)
        logits: Tensor = gemm.logits(Call(hidden.shape[0], hidden, weight, tensors, None, None, prepared, None, stream))
        return logits

    def select(
        self,
        logits: Tensor,
        tensors: RouterTensors,
        input_ids: Tensor | None,
        padding: Tensor | None = None,
        out: Routing | None = None,
    ) -> Routing:
        """Logits [M, R] -> routing, with the logits. See `moegate.select`."""
        index = self._index
        if index is not None and gpu.current_device() != index:
            with torch.cuda.device(index):
                return self.select(logits, tensors, input_ids, padding, out)
        stream = 0 if index is None else gpu.current_stream(index)
        select = self._at("selection", logits.shape[0], self.plan.problem.dtypes.hidden, input_ids, padding)
        # A selection reads neither hidden states nor a weight.
        call = Call(logits.shape[0], logits, logits, tensors, input_ids, padding, {}, out, stream)
        routing: Routing = select(call, logits)
        return routing

    def _at(
        self,
        half: Half,
        num_tokens: int,
        hidden_dtype: torch.dtype,
        input_ids: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Any:
        """What runs a half for so many tokens.

        Raises:
            ValueError: The backend is forced, and cannot.
        """
        key: tuple[Any, ...] = (half, hidden_dtype)
        if input_ids is not None or padding is not None:
            ids_dtype = None if input_ids is None else input_ids.dtype
            key = _key(half, hidden_dtype, ids_dtype, None if padding is None else padding.dtype)
        ends, bound = self._by_half.get(key) or self._bind_in_call(*key)
        found = bound[bisect_left(ends, num_tokens)]
        if found is None:
            self.plan.choice(num_tokens, self.plan.problem.given(*key[1:]))
            raise AssertionError("the plan has a candidate where it had none")
        return found

    def _bind_in_call(self, half: Half, *dtypes: Any) -> ByTokens[Any]:
        """The same as `_bind`; says that a call of a prepared module waited for it, if it took long."""
        start = time.perf_counter()
        found = self._bind(half, *dtypes)
        seconds = time.perf_counter() - start
        if half in self._prepared and seconds > _SECONDS_OF_COMPILING:
            problem = self.plan.problem.given(*dtypes)
            _log.warning(
                "a call waited %.1f s for kernels to be compiled (%s); warmup() does so before", seconds, problem
            )
        return found

    def _bind(self, half: Half, *dtypes: Any) -> ByTokens[Any]:
        """Finds and compiles what runs for calls with these dtypes."""
        problem, plan, device = self.plan.problem.given(*dtypes), self.plan, self._device
        spans = plan.spans if problem is plan.problem else plan.spans_for(problem)
        if self._only is not None:
            spans = (Span(1, None, self._only),)
        gemms = cache(lambda way: way.bind(problem, device))
        alone = cache(lambda way: way.bind(problem, device, None))
        no_tokens = NoTokens(problem, device)

        def both(candidate: Candidate) -> tuple[BoundGemm, BoundSelection]:
            gemm = gemms(candidate.gemm)
            return gemm, candidate.selection.bind(problem, device, gemm)

        bind, nothing = {
            "both": (both, (no_tokens, no_tokens.select)),
            "gemm": (lambda candidate: gemms(candidate.gemm), no_tokens),
            "selection": (lambda candidate: alone(candidate.selection), no_tokens.select),
        }[half]
        found = by_tokens(spans, bind, None if self._is_torch else nothing)
        self._by_half[(half, *dtypes)] = found
        return found


def _key(half: Half, hidden: torch.dtype, ids: torch.dtype | None, padding: torch.dtype | None) -> tuple[Any, ...]:
    """Of `Dispatch._by_half`; short for the usual call, which brings hidden states alone."""
    return (half, hidden) if ids is None and padding is None else (half, hidden, ids, padding)


class Options(NamedTuple):
    """How a router is to run; see `Gate`."""

    frozen: bool = False
    pdl: bool = True
    backend: str | None = None
    policy: str = "measured"


@cache
def dispatch_of(problem: Problem, policy: str, backend: str | None) -> Dispatch:
    """What runs the calls of a problem on a machine that is here. Warns, once, of a slow path in its plan.

    Raises:
        ValueError: An unknown policy or backend; or the backend is forced and cannot run.
    """
    plan = proven_plan(problem, policy, backend)
    warn_of_slow_paths(plan)
    return Dispatch(plan)


def _dispatch(device: torch.device, spec: RouterSpec, dtypes: Dtypes, options: Options) -> Dispatch:
    frozen, pdl, backend, policy = options
    return dispatch_of(Problem(machine_of(device), spec, dtypes, frozen, pdl), policy, backend)


def for_route(
    device: torch.device, spec: RouterSpec, weight: Tensor, tensors: RouterTensors, options: Options
) -> Dispatch:
    """What runs whole routes."""
    # Calls copy a weight whose rows are not aligned. The copy is the kernel in front, and nobody may load it early.
    if options.frozen and weight.is_cuda and not gpu.is_aligned(weight):
        options = options._replace(frozen=False)
    return _dispatch(device, spec, dtypes_of(spec, weight.dtype, tensors), options)


def for_gemm(
    device: torch.device, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, options: Options
) -> Dispatch:
    """What runs the GEMM alone: that of a router with the same logits, which chooses one expert."""
    rows, hidden_size = weight.shape
    spec = _spec_of_gemm(hidden_size, rows, bias is not None, out_dtype == torch.bfloat16)
    return for_route(device, spec, weight, RouterTensors(bias), options)


def for_selection(
    device: torch.device, spec: RouterSpec, logits_dtype: torch.dtype, tensors: RouterTensors, options: Options
) -> Dispatch:
    """What runs the selection alone, on logits in any dtype that logits may have."""
    spec = _with_logits(spec, logits_dtype == torch.bfloat16)
    return _dispatch(device, spec, dtypes_of(spec, default_weight_dtype(spec), tensors), options)


@cache
def _spec_of_gemm(hidden_size: int, rows: int, has_bias: bool, is_bfloat16: bool) -> RouterSpec:
    logits_dtype: LogitsDtype = "bfloat16" if is_bfloat16 else "float32"
    return RouterSpec(hidden_size, rows, 1, linear_bias=has_bias, logits_dtype=logits_dtype)


@cache
def _with_logits(spec: RouterSpec, is_bfloat16: bool) -> RouterSpec:
    return replace(spec, logits_dtype="bfloat16" if is_bfloat16 else "float32")


def forget() -> None:
    """Empties the caches of this process, so that every plan is made anew, as after new measurements."""
    for known in (
        dispatch_of,
        tables.table_for,
        costs.expected,
        costs.curves_of,
        costs.most_tokens,
        costs.tells_of_not_frozen,
        policies.gemm_tokens,
    ):
        known.cache_clear()


def proven_plan(problem: Problem, policy: str, backend: str | None) -> Plan:
    """The plan on a machine that is here. FlashInfer's functions are tried out; a plan has none that failed.

    Raises:
        ValueError: See `Plan`.
    """
    device = problem.machine.device
    assert device is not None
    while True:
        plan = Plan(problem, policy, backend)
        if not any([candidate.try_out(problem, device) for candidate in plan.candidates]):
            return plan
