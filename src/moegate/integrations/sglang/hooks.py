"""The three hooks, and what of SGLang they rely on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any

from sglang.srt.layers.moe import topk
from sglang.srt.layers.moe.hash_topk import HashTopK
from sglang.srt.model_executor.model_runner import ModelRunner
from sglang.srt.models.deepseek_v2 import MoEGate
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from moegate.integrations import engines
from moegate.integrations.sglang import gate, in_place
from moegate.integrations.sglang.report import REPORT
from moegate.integrations.sglang.top_k import MoegateTopK

CONFIG_FIELDS = {
    "top_k",
    "use_grouped_topk",
    "topk_group",
    "num_expert_group",
    "renormalize",
    "shared_experts",
    "custom_routing_function",
    "correction_bias",
    "torch_native",
    "routed_scaling_factor",
    "apply_routed_scaling_factor_on_output",
    "fused_shared_experts_scaling_factor",
    "output_format",
    "runner_backend",
    "routing_method_type",
    "scoring_func",
    "sqrtsoftplus_log1p",
    "fused_gate_packed_ids",
    "allow_routed_experts_capture",
    "layer_id",
}
"""All that `TopKConfig` says. A field more may mean a router that moegate does not know."""
_SIGNATURES: tuple[tuple[Callable[..., Any], str], ...] = (
    (MoEGate.forward, "self hidden_states gemm_output_zero_allocator forward_batch"),
    (
        topk.TopK.forward_cuda,
        "self hidden_states router_logits num_token_non_padded expert_location_dispatch_info dynamic_expert_bias"
        " router_logits_partials",
    ),
    (topk.TopK._resolve_routing_inputs, "self num_token_non_padded expert_location_dispatch_info"),
    (topk.TopK._apply_waterfill, "self topk_output num_tokens"),
    (
        topk.select_experts,
        "hidden_states router_logits topk_config layer_id num_token_non_padded expert_location_dispatch_info"
        " dynamic_expert_bias router_logits_partials",
    ),
    (topk.fused_shared_expert_weight, "routed_scaling_factor fused_in_topk"),
    (ModelRunner.load_model, "self"),
)


def add() -> str | None:
    """Registers the hooks, which SGLang then applies.

    Returns:
        Why no hook was registered; None: they are.

    Raises:
        ValueError: A value of MOEGATE_LOGITS that is not allowed.
    """
    engines.logits_dtype("float32")
    reason = _what_differs()
    if reason is None:
        _register()
    return reason


def _what_differs() -> str | None:
    """What of SGLang is not as it was when this was written; None: nothing."""
    if topk.TopK is not MoegateTopK:
        for function, expected in _SIGNATURES:
            if list(inspect.signature(function).parameters) != expected.split():
                return f"{function.__qualname__} has other parameters"
    found = {field.name for field in fields(topk.TopKConfig) if field.init}
    if found != CONFIG_FIELDS:
        return f"TopKConfig has other fields: {', '.join(sorted(found ^ CONFIG_FIELDS))}"
    return None


@cache
def _register() -> None:
    for target, hook, kind in (
        ("sglang.srt.layers.moe.topk.TopK", MoegateTopK, HookType.REPLACE),
        ("sglang.srt.models.deepseek_v2.MoEGate.forward", gate.forward, HookType.AROUND),
        ("sglang.srt.model_executor.model_runner.ModelRunner.load_model", after_load, HookType.AFTER),
    ):
        HookRegistry.register(target, hook, kind)
        in_place.expect(target, hook)


def after_load(_: Any, runner: Any) -> None:
    """When a model has been loaded: checks the hooks, and notes the layers that have no `TopK`."""
    in_place.check()
    for name, module in runner.model.named_modules():
        if isinstance(module, HashTopK):
            REPORT.note(name, "hash routing")
