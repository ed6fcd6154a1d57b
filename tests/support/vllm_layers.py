"""Routers and gates of vLLM, as its runner holds them, and how moegate's routing is held against theirs."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

from moegate import RouterSpec, Routing
from moegate.contract.reference import choice_keys
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors

HIDDEN, EXPERTS, TOP_K = 64, 32, 4


def bias() -> Tensor:
    """A correction bias that changes the choice."""
    return torch.randn(EXPERTS, generator=torch.Generator().manual_seed(3)) * 0.2


_SIZES: dict[str, Any] = {"top_k": TOP_K, "global_num_experts": EXPERTS}
_GROUPS: dict[str, Any] = {"num_expert_group": 4, "topk_group": 2}
_SPEC = RouterSpec(HIDDEN, EXPERTS, TOP_K)
_BIASED = replace(_SPEC, scoring_func="sigmoid", correction_bias="score", renormalize=True)
_GROUPED = replace(_BIASED, n_group=4, topk_group=2, routed_scaling_factor=2.5)

ROUTERS: dict[str, tuple[Any, RouterSpec]] = {
    "softmax": (lambda: FusedTopKRouter(**_SIZES, renormalize=False), _SPEC),
    "softmax, renormalised": (lambda: FusedTopKRouter(**_SIZES), replace(_SPEC, renormalize=True)),
    "sigmoid": (
        lambda: FusedTopKRouter(**_SIZES, scoring_func="sigmoid"),
        replace(_SPEC, scoring_func="sigmoid", renormalize=True),
    ),
    "sigmoid with a bias": (lambda: FusedTopKBiasRouter(**_SIZES, e_score_correction_bias=bias()), _BIASED),
    "softmax with a bias and a factor": (
        lambda: FusedTopKBiasRouter(
            **_SIZES,
            e_score_correction_bias=bias() / 8,
            scoring_func="softmax",
            renormalize=False,
            routed_scaling_factor=1.5,
        ),
        replace(_SPEC, correction_bias="score", routed_scaling_factor=1.5),
    ),
    "sqrtsoftplus": (
        lambda: FusedTopKBiasRouter(
            **_SIZES, e_score_correction_bias=bias(), scoring_func="sqrtsoftplus", routed_scaling_factor=1.5
        ),
        replace(_BIASED, scoring_func="sqrtsoftplus", routed_scaling_factor=1.5),
    ),
    "groups": (
        lambda: GroupedTopKRouter(
            **_SIZES, **_GROUPS, scoring_func="sigmoid", e_score_correction_bias=bias(), routed_scaling_factor=2.5
        ),
        _GROUPED,
    ),
    "groups without a bias": (
        lambda: GroupedTopKRouter(**_SIZES, **_GROUPS, renormalize=False, routed_scaling_factor=16.0),
        replace(_SPEC, n_group=4, topk_group=2, group_score="max", routed_scaling_factor=16.0),
    ),
    "one group": (
        lambda: GroupedTopKRouter(**_SIZES, num_expert_group=1, topk_group=1, scoring_func="sigmoid"),
        replace(_SPEC, scoring_func="sigmoid", renormalize=True),
    ),
    "softmax on a CPU": (lambda: CPURouter(**_SIZES), replace(_SPEC, renormalize=True)),
    "groups on a CPU": (
        lambda: CPURouter(
            **_SIZES,
            **_GROUPS,
            use_grouped_topk=True,
            scoring_func="sigmoid",
            e_score_correction_bias=bias(),
            routed_scaling_factor=2.5,
        ),
        _GROUPED,
    ),
}
"""Each kind of router that moegate takes over, with the spec worked out by hand."""


def runner_of(router: Any, gate: Any = None, **changes: Any) -> Any:
    """What moegate's layer reads of a runner."""
    method = SimpleNamespace(is_monolithic=False, topk_indices_dtype=None)
    config = SimpleNamespace(
        num_logical_experts=EXPERTS,
        hidden_dim=HIDDEN,
        in_dtype=torch.bfloat16,
        pcp_size=1,
        moe_parallel_config=SimpleNamespace(use_all2all_kernels=False),
    )
    runner = SimpleNamespace(
        router=router,
        gate=gate,
        moe_config=config,
        _quant_method=method,
        routed_experts=SimpleNamespace(quant_method=method),
        _fse_fuse_gate=False,
        do_naive_dispatch_combine=False,
    )
    for name, value in changes.items():
        setattr(config if hasattr(config, name) else method if hasattr(method, name) else runner, name, value)
    return runner


def tensors_of(router: Any) -> RouterTensors:
    """The small tensors of a router."""
    return RouterTensors(e_score_correction_bias=getattr(router, "e_score_correction_bias", None))


def in_order(ids: Tensor, weights: Tensor, logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> Routing:
    """A routing with the experts of each row in descending order of key; vLLM leaves the order open."""
    keys = choice_keys(logits.double(), spec, tensors).gather(-1, ids.long())
    order = keys.argsort(dim=-1, descending=True)
    return Routing(ids.gather(-1, order), weights.gather(-1, order))


def hold_engine(ids: Tensor, weights: Tensor, logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> None:
    """Holds vLLM's own routing of these logits to moegate's contract, as a backend that may break ties otherwise."""
    routing = in_order(ids, weights, logits, spec, tensors)
    nothing = torch.zeros(logits.shape, dtype=torch.float64)
    verdict = verify_routing(routing, logits, spec, tensors, logit_error=nothing)
    assert not verdict.problems
