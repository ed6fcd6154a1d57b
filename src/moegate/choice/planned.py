"""The plan of a gate, made to run: FlashInfer tried out where it is to run, and dispatch by M where a plan mixes."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from moegate.backends import BACKENDS, choose
from moegate.backends.base import Router
from moegate.backends.cuda import CudaBackend
from moegate.backends.cuda.tiling import MAX_DECODE_TOKENS, MAX_GEMM_TOKENS
from moegate.backends.flashinfer import FlashInferRouter, limits
from moegate.choice.candidates import (
    FLASHINFER_GEMM,
    FLASHINFER_PAIR,
    FLASHINFER_TINYGEMM,
    FLASHINFER_TOP_K,
    ROUTER_GEMM,
    TORCH,
    Candidate,
)
from moegate.choice.facts import Facts, facts_of, machine_of
from moegate.choice.plan import Plan, warn_of_slow_paths
from moegate.choice.policies import gemm_tokens
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec


@cache
def planned(
    device: torch.device,
    spec: RouterSpec,
    weight: torch.dtype,
    bias: torch.dtype | None = None,
    *,
    frozen: bool,
    policy: str = "measured",
    backend: str | None = None,
) -> tuple[Plan, Router]:
    """The plan for gates that are alike, and what runs it; the dtypes are of the weight and of the linear bias.

    Warns, once, of a slow path in it.

    Raises:
        ValueError: An unknown policy or backend; or the backend is forced and cannot run.
    """
    facts = facts_of(machine_of(device), spec, weight, bias, frozen=frozen)
    plan = proven_plan(facts, policy, backend)
    warn_of_slow_paths(plan)
    if {candidate.backend for candidate in plan.candidates} == {"cuda"}:
        return plan, CudaBackend(gemm_tokens(facts))  # tells the numbers of tokens apart by itself
    routers = {candidate: router_of(candidate, facts) for candidate in plan.candidates}
    if plan.candidates == (TORCH,):
        return plan, routers[TORCH]
    return plan, PlannedRouter(plan, routers)


def proven_plan(facts: Facts, policy: str, backend: str | None) -> Plan:
    """The plan on a machine that is here, after what it wants of FlashInfer was tried out: what failed is not in it.

    Raises:
        ValueError: See `Plan`.
    """
    device = facts.machine.device
    assert device is not None
    while True:
        plan = Plan(facts, policy, backend)
        wanted = [router_of(candidate, facts) for candidate in plan.candidates]
        reasons = [router.try_out(facts.spec, device) for router in wanted if isinstance(router, FlashInferRouter)]
        if not any(reasons):
            return plan


@cache
def router_of(candidate: Candidate, facts: Facts) -> Router:
    """What runs a candidate, at every number of tokens that it supports, on a machine that is here."""
    spec = facts.spec
    if candidate.backend == "cuda":
        return CudaBackend(MAX_GEMM_TOKENS if candidate is ROUTER_GEMM else MAX_DECODE_TOKENS)
    if candidate is TORCH:
        return next(backend for backend in BACKENDS if backend.name == "torch")
    gemm = limits.GEMMS.get((spec.hidden_size, spec.num_gate_rows))
    functions = {
        FLASHINFER_GEMM: (gemm, None),
        FLASHINFER_PAIR: (gemm, limits.TOP_K),
        FLASHINFER_TOP_K: (None, limits.TOP_K),
        FLASHINFER_TINYGEMM: (limits.TINYGEMM, None),
    }
    assert facts.machine.device is not None
    return FlashInferRouter(*functions[candidate], choose(facts.machine.device, spec))


class PlannedRouter:
    """Several routers, and the plan that says which of them takes a call."""

    def __init__(self, plan: Plan, routers: dict[Candidate, Router]) -> None:
        self._plan, self._routers = plan, routers
        self._by_call: dict[tuple[int, torch.dtype], Candidate] = {}

    @property
    def name(self) -> str:
        """The backends that take part."""
        return "+".join(dict.fromkeys(router.name for router in self._routers.values()))

    def prepare(
        self, weight: Tensor, spec: RouterSpec, tensors: RouterTensors, *, frozen: bool, pdl: bool
    ) -> dict[Candidate, object | None]:
        """What each of them prepares; candidates that one router runs share it."""
        by_router = {
            router: router.prepare(weight, spec, tensors, frozen=frozen, pdl=pdl)
            for router in dict.fromkeys(self._routers.values())
        }
        return {candidate: by_router[router] for candidate, router in self._routers.items()}

    def route(
        self,
        hidden: Tensor,
        weight: Tensor,
        spec: RouterSpec,
        tensors: RouterTensors,
        input_ids: Tensor | None,
        prepared: object | None,
        out: Routing | None = None,
    ) -> Routing:
        """See `moegate.route`."""
        call = hidden.shape[0], hidden.dtype
        candidate = self._by_call.get(call)
        if candidate is None:
            candidate = self._by_call[call] = self._plan.choice(*call).candidate
        assert prepared is None or isinstance(prepared, dict)
        own = None if prepared is None else prepared[candidate]
        return self._routers[candidate].route(hidden, weight, spec, tensors, input_ids, own, out)
