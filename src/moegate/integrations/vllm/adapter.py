"""vLLM's routers as moegate's: the fields of a `RouterSpec`, or the reason why there is none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moegate.integrations.takeover import LeftToEngineError
from moegate.integrations.vllm.signatures import LAYERS


class Rule(NamedTuple):
    """How a router of vLLM chooses experts and weighs them."""

    fields: dict[str, Any]
    """Fields of a `RouterSpec`, all but the sizes and the dtypes."""
    correction_bias: Tensor | None
    """vLLM's own tensor."""


def rule_of(router: Any, num_experts: int) -> Rule:
    """Reads a router of vLLM.

    All values come from the router, never from the model's config: what the runner applies itself, such as a scaling
    factor of the output, does not reach the router.

    Args:
        router: Any of vLLM's routers.
        num_experts: The logits of a token.

    Raises:
        LeftToEngineError: A router that moegate does not compute, or does not know.
    """
    kind = type(router)
    if kind.__name__ in _LEFT:
        raise LeftToEngineError(_LEFT[kind.__name__])
    known = _KNOWN.get(f"{kind.__module__}.{kind.__name__}")
    if known is None or "_compute_routing" in vars(router):
        raise LeftToEngineError(f"unknown router {kind.__name__}")
    # A parameter that did not exist when this was written may change what the router computes.
    others = inspect.signature(kind).parameters.keys() - known.parameters - _COMMON
    if others:
        raise LeftToEngineError(f"unknown parameter {min(others)} of {kind.__name__}")
    if getattr(router, "bias_vl", None) is not None:
        raise LeftToEngineError("a correction bias by row")
    if getattr(router, "_hash_indices_table", None) is not None:
        raise LeftToEngineError("hash routing")
    if getattr(router, "num_fused_shared_experts", 0):
        raise LeftToEngineError("fused shared experts")
    fields, bias = known.read(router, num_experts)
    if bias is not None:
        if bias.dtype != torch.float32:  # a widened copy would not follow the writes of a reload
            raise LeftToEngineError(f"a correction bias in {str(bias.dtype).removeprefix('torch.')}")
        fields["correction_bias"] = "score"
    return Rule({"renormalize": bool(router.renormalize), **fields}, bias)


_Read = tuple[dict[str, Any], "Tensor | None"]


def _fused_topk(router: Any, num_experts: int) -> _Read:
    return {"scoring_func": router.scoring_func}, None


def _fused_topk_bias(router: Any, num_experts: int) -> _Read:
    fields = {"scoring_func": router.scoring_func, "routed_scaling_factor": float(router.routed_scaling_factor)}
    return fields, router.e_score_correction_bias


def _grouped_topk(router: Any, num_experts: int) -> _Read:
    groups, bias = router.num_expert_group, router.e_score_correction_bias
    if num_experts <= groups or num_experts % groups:
        # vLLM then routes without groups, and in part without the router's scoring function.
        raise LeftToEngineError(f"{num_experts} experts in {groups} groups")
    fields, _ = _fused_topk_bias(router, num_experts)
    if groups > 1:
        fields |= {
            "n_group": groups,
            "topk_group": router.topk_group,
            "group_score": "max" if bias is None else "top2_sum",
        }
    return fields, bias


def _cpu(router: Any, num_experts: int) -> _Read:
    if router.use_grouped_topk:
        return _grouped_topk(router, num_experts)
    if router.custom_routing_function is not None:
        raise LeftToEngineError("custom routing function")
    # Without groups, vLLM's router for CPUs has a softmax that looks at no bias and no factor, and kernels of its own
    # for sqrtsoftplus.
    if router.scoring_func != "softmax" or router.e_score_correction_bias is not None:
        raise LeftToEngineError(f"{router.scoring_func} with a correction bias on a CPU")
    if router.routed_scaling_factor != 1.0:
        raise LeftToEngineError("a scaling factor that vLLM's router for CPUs leaves out")
    return _fused_topk(router, num_experts)


class _Known(NamedTuple):
    """A router class: how it is read, and the parameters that were there when this was written."""

    read: Callable[[Any, int], _Read]
    parameters: frozenset[str]


_COMMON = frozenset({"top_k", "global_num_experts", "renormalize", "scoring_func", "eplb_state"})
_BIASED = frozenset({"e_score_correction_bias", "routed_scaling_factor"})
_GROUPED = frozenset({"num_expert_group", "topk_group", *_BIASED})
_SHARED = frozenset({"num_fused_shared_experts"})
_KNOWN = {
    f"{LAYERS}.router.{name}": known
    for name, known in {
        "fused_topk_router.FusedTopKRouter": _Known(_fused_topk, frozenset()),
        "fused_topk_bias_router.FusedTopKBiasRouter": _Known(
            _fused_topk_bias,
            _BIASED | _SHARED | {"hash_indices_table", "shared_expert_weight", "bias_vl", "image_sentinel_lo"},
        ),
        "grouped_topk_router.GroupedTopKRouter": _Known(_grouped_topk, _GROUPED | _SHARED | {"skip_padding"}),
        "cpu_router.CPURouter": _Known(
            _cpu, _GROUPED | {"use_grouped_topk", "custom_routing_function", "hash_indices_table"}
        ),
    }.items()
}
_LEFT = {
    "AiterSharedRoutedFusedMoERouter": "fused shared experts",
    "CustomRoutingRouter": "custom routing function",
    "RoutingSimulatorRouter": "simulated routing",
    "ZeroExpertRouter": "zero experts",
}
