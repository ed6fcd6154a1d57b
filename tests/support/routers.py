"""Specs and tensors for several tests."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moegate import RouterSpec
from moegate.routing import RouterTensors

# One spec for each branch of the contract, at sizes that are no powers of two.
SPECS: dict[str, RouterSpec] = {
    "softmax": RouterSpec(64, 60, 4),
    "softmax renormalised": RouterSpec(64, 128, 8, renormalize=True),
    "softmax renormalised with eps": RouterSpec(64, 33, 5, renormalize=True, renormalize_eps=1e-20),
    "softmax in groups by max": RouterSpec(64, 40, 6, n_group=8, topk_group=3, group_score="max"),
    "softmax in groups by top2_sum": RouterSpec(64, 24, 3, n_group=4, topk_group=2, renormalize=True),
    "softmax of selected": RouterSpec(64, 32, 4, "identity", weights_from="softmax_of_selected", linear_bias=True),
    "softmax with bias and floor": RouterSpec(
        64, 64, 6, correction_bias="score", renormalize=True, renormalize_floor=1e-12, weight_dtype="float32"
    ),
    "softmax with bias and zero experts": RouterSpec(
        64, 20, 5, correction_bias="score", num_zero_experts=11, routed_scaling_factor=6.0
    ),
    "sigmoid": RouterSpec(64, 7, 5, "sigmoid", renormalize=True),
    "sigmoid with bias": RouterSpec(64, 288, 8, "sigmoid", "score", renormalize=True),
    "sigmoid with bias in groups": RouterSpec(
        64, 256, 8, "sigmoid", "score", 8, 4, renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=2.5
    ),
    "sigmoid of selected": RouterSpec(64, 16, 1, "identity", weights_from="sigmoid_of_selected"),
    "sigmoid with logit bias": RouterSpec(64, 48, 6, "sigmoid", "logit"),
    "sigmoid, multiplier and cap": RouterSpec(
        64, 30, 7, "sigmoid", "score", renormalize=True, logit_multiplier=0.177, logit_softcapping=3.0
    ),
    "sigmoid with shared gates": RouterSpec(
        64,
        256,
        6,
        "sigmoid",
        "score",
        renormalize=True,
        num_shared_gates=2,
        global_scale=True,
        routed_scaling_factor=8.0,
    ),
    "sqrtsoftplus with bias": RouterSpec(
        64, 96, 6, "sqrtsoftplus", "score", renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=1.5
    ),
    "hash": RouterSpec(
        64,
        96,
        6,
        "sqrtsoftplus",
        hash_routing=True,
        renormalize=True,
        routed_scaling_factor=1.5,
        topk_ids_dtype="int64",
    ),
    "input norm and expert scale": RouterSpec(
        64, 25, 8, renormalize=True, input_norm_eps=1e-6, per_expert_scale=True, topk_weights_dtype="bfloat16"
    ),
    "identity": RouterSpec(64, 12, 3, "identity", topk_ids_dtype="int64", topk_weights_dtype="float16"),
    "all experts": RouterSpec(64, 9, 9, "sigmoid", "score", renormalize=True),
    "one expert": RouterSpec(64, 1, 1),
    "softmax per group": RouterSpec(64, 64, 8, n_group=8, topk_group=8, select_per_group=True, renormalize=True),
    "several per group, groups across lanes": RouterSpec(
        64, 40, 15, "sigmoid", "score", 5, 5, select_per_group=True, num_zero_experts=5, renormalize=True
    ),
    "several per group, groups of lanes": RouterSpec(64, 96, 12, "sigmoid", "logit", 4, 4, select_per_group=True),
    "groups by topj_sum": RouterSpec(
        64, 96, 6, "sigmoid", "score", 4, 2, "topj_sum", group_score_top_j=3, renormalize=True
    ),
    "groups by topj_sum, across lanes": RouterSpec(64, 60, 8, "softmax", None, 6, 3, "topj_sum", group_score_top_j=4),
    "largest per group": RouterSpec(64, 1024, 32, "sigmoid", "score", 2, 2, select_per_group=True, renormalize=True),
    "largest by topj_sum": RouterSpec(
        64, 1024, 32, "sqrtsoftplus", "score", 4, 2, "topj_sum", group_score_top_j=16, renormalize=True
    ),
    "largest": RouterSpec(64, 1000, 32, "sigmoid", "score", num_zero_experts=24, renormalize=True),
}

VOCABULARY = 50


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tensors_of(spec: RouterSpec, seed: int = 0) -> RouterTensors:
    """Random small tensors: exactly those that the spec asks for."""
    g = generator(seed)
    rows = torch.rand(VOCABULARY, spec.num_experts, generator=g)
    return RouterTensors(
        bias=torch.randn(spec.num_gate_rows, generator=g) if spec.linear_bias else None,
        e_score_correction_bias=(
            0.2 * torch.randn(spec.num_selectable, generator=g) if spec.correction_bias is not None else None
        ),
        input_scale=1 + 0.1 * torch.randn(spec.hidden_size, generator=g) if spec.input_norm_eps is not None else None,
        per_expert_scale=1 + 0.3 * torch.randn(spec.num_experts, generator=g) if spec.per_expert_scale else None,
        global_scale=torch.tensor([0.7]) if spec.global_scale else None,
        tid2eid=rows.argsort(dim=-1)[:, : spec.top_k].int() if spec.hash_routing else None,
    )


def select_arguments(spec: RouterSpec, tensors: RouterTensors, num_tokens: int) -> dict[str, Tensor]:
    """The keyword arguments of `select` for these tensors."""
    given = {
        name: value
        for name, value in tensors._asdict().items()
        if value is not None and name not in ("bias", "input_scale")
    }
    if spec.hash_routing:
        given["input_ids"] = token_ids(num_tokens)
    return given


def route_arguments(spec: RouterSpec, tensors: RouterTensors, num_tokens: int) -> dict[str, Tensor]:
    """The keyword arguments of `route` for these tensors."""
    given = {name: value for name, value in tensors._asdict().items() if value is not None}
    if spec.hash_routing:
        given["input_ids"] = token_ids(num_tokens)
    return given


def token_ids(num_tokens: int) -> Tensor:
    return torch.arange(num_tokens) * 7 % VOCABULARY


def random_logits(spec: RouterSpec, num_tokens: int, seed: int = 0) -> Tensor:
    logits = 2 * torch.randn(num_tokens, spec.num_gate_rows, generator=generator(seed))
    return logits.to(getattr(torch, spec.logits_dtype))


def with_bfloat16_logits(spec: RouterSpec) -> RouterSpec:
    return replace(spec, logits_dtype="bfloat16")
