"""A plan made to run: the one place where the number of tokens decides which candidate a call runs."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moegate.choice import costs, policies, tables
from moegate.choice.candidates import Candidate
from moegate.choice.machines import machine_of
from moegate.choice.plan import Plan, Span, warn_of_slow_paths
from moegate.cuda import device as gpu
from moegate.halves import BoundGemm, BoundSelection, Call, Logits, Prepared
from moegate.problem import Dtypes, Problem, default_weight_dtype, dtypes_of
from moegate.routing import RouterTensors, Routing, outputs_of
from moegate.spec import RouterSpec
from moegate.spec_values import LogitsDtype


class _Bound(NamedTuple):
    """What runs for one dtype of hidden states and one of token ids."""

    ends: list[int]
    """The last number of tokens of each span, less that of the last one, which has none."""
    halves: list[tuple[BoundGemm, BoundSelection] | None]
    """By span; None: a forced backend cannot run there."""


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
        self._by_dtypes: dict[tuple[Any, ...], _Bound] = {}
        self._selections: dict[object, BoundSelection] = {}

    @property
    def name(self) -> str:
        """The backends that take part."""
        return "+".join(dict.fromkeys(candidate.backend for candidate in self._candidates))

    def prepare(self, weight: Tensor) -> Prepared:
        """Compiles for a gate's likely calls; returns what is made once of a frozen weight."""
        problem = self.plan.problem
        self._bind(problem.dtypes.hidden, problem.dtypes.input_ids, problem.dtypes.padding)
        if not problem.frozen:
            return {}
        made = {each.gemm: each.gemm.prepare(problem, weight) for each in self._candidates}
        return {gemm: prepared for gemm, prepared in made.items() if prepared is not None}

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
        ids_dtype = None if input_ids is None else input_ids.dtype
        gemm, select = self._halves(num_tokens, hidden.dtype, ids_dtype, None if padding is None else padding.dtype)
        call = tuple.__new__(Call, (num_tokens, hidden, weight, tensors, input_ids, padding, prepared, out, stream))
        return select(call, gemm(call))

    def router_gemm(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Hidden states [M, K] -> logits [M, R]. See `moegate.router_gemm`."""
        index = self._index
        if index is not None and gpu.current_device() != index:
            with torch.cuda.device(index):
                return self.router_gemm(hidden, weight, bias)
        gemm, _ = self._halves(hidden.shape[0], hidden.dtype, None, None)
        stream = 0 if index is None else gpu.current_stream(index)
        return gemm.logits(Call(hidden.shape[0], hidden, weight, RouterTensors(bias), None, None, {}, None, stream))

    def select(
        self, logits: Tensor, tensors: RouterTensors, input_ids: Tensor | None, padding: Tensor | None = None
    ) -> Routing:
        """Logits [M, R] -> routing, with the logits. See `moegate.select`."""
        index = self._index
        if index is not None and gpu.current_device() != index:
            with torch.cuda.device(index):
                return self.select(logits, tensors, input_ids, padding)
        ids_dtype = None if input_ids is None else input_ids.dtype
        select = self._selection(logits.shape[0], ids_dtype, None if padding is None else padding.dtype)
        stream = 0 if index is None else gpu.current_stream(index)
        # A selection reads neither hidden states nor a weight.
        call = Call(logits.shape[0], logits, logits, tensors, input_ids, padding, {}, None, stream)
        return select(call, logits)

    def _halves(self, num_tokens: int, *dtypes: Any) -> tuple[BoundGemm, BoundSelection]:
        """What runs for so many tokens; `dtypes`: of hidden states, token ids and padding.

        Raises:
            ValueError: The backend is forced, and cannot.
        """
        ends, halves = self._by_dtypes.get(dtypes) or self._bind(*dtypes)
        found = halves[bisect_left(ends, num_tokens)]
        if found is None:
            self.plan.choice(num_tokens, self.plan.problem.given(*dtypes))
            raise AssertionError("the plan has a candidate where it had none")
        return found

    def _bind(self, *dtypes: Any) -> _Bound:
        """Finds and compiles what runs for calls with these dtypes."""
        problem = self.plan.problem.given(*dtypes)
        plan = self.plan
        spans = plan.spans if problem is plan.problem else plan.spans_for(problem)
        if self._only is not None:
            spans = (Span(1, None, self._only),)
        candidates = dict.fromkeys(span.candidate for span in spans)
        halves = {candidate: self._bound(candidate, problem) for candidate in candidates}
        bound = _Bound([], [])
        if not self._is_torch:
            bound.ends.append(0)
            bound.halves.append(_no_tokens(problem, self._device))
        following = 1
        for first, last, candidate in spans:
            if first > following:
                bound.ends.append(first - 1)
                bound.halves.append(None)
            bound.halves.append(halves[candidate])
            if last is not None:
                bound.ends.append(last)
                following = last + 1
        if len(bound.halves) == len(bound.ends):  # no candidate for any further number of tokens
            bound.halves.append(None)
        self._by_dtypes[dtypes] = bound
        return bound

    def _bound(self, candidate: Candidate, problem: Problem) -> tuple[BoundGemm, BoundSelection]:
        gemm = candidate.gemm.bind(problem, self._device)
        return gemm, candidate.selection.bind(problem, self._device, gemm)

    def _selection(self, num_tokens: int, *dtypes: Any) -> BoundSelection:
        """The selection alone that runs for so many tokens; `dtypes`: of token ids and padding."""
        problem = self.plan.problem.given(self.plan.problem.dtypes.hidden, *dtypes)
        if num_tokens == 0 and not self._is_torch:
            return _no_tokens(problem, self._device)[1]
        selection = self.plan.choice(num_tokens, problem).candidate.selection
        key = selection, dtypes
        if key not in self._selections:
            self._selections[key] = selection.bind(problem, self._device, None)
        return self._selections[key]


class _NoTokens:
    """Both halves where there is nothing to compute: only the tensors are made."""

    num_terms = holds_dependents_to = 0

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._spec, self._device = problem.spec, device

    def logits(self, call: Call) -> Tensor:
        """No logits [0, R]."""
        made = self._made(call).logits
        assert made is not None
        return made

    def select(self, call: Call, logits: Logits) -> Routing:
        """The routing of no token."""
        assert isinstance(logits, Tensor)
        return self._made(call)._replace(logits=logits)

    __call__ = logits

    def _made(self, call: Call) -> Routing:
        if call.out is not None and call.out.logits is not None:
            return call.out
        made = (
            torch.empty(each.shape(0), dtype=each.dtype, device=self._device) if each.is_there else None
            for each in outputs_of(self._spec)
        )
        return Routing(*made).into(call.out)  # type: ignore[arg-type]


def _no_tokens(problem: Problem, device: torch.device) -> tuple[BoundGemm, BoundSelection]:
    nothing = _NoTokens(problem, device)
    return nothing, nothing.select


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
