"""What is left to SGLang, each with its reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import sglang_layers
import torch
from sglang_layers import EXPERTS, GROUPED, HIDDEN, backend_of, bias_of, hidden_of, logits_of, top_k_of

TRTLLM_ROUTED = SimpleNamespace(is_flashinfer_trtllm_routed=lambda: True)


def shared(slots: int) -> Any:
    from sglang.srt.configs.shared_experts import SharedExpertsConfig

    return SharedExpertsConfig(num_fused_shared_experts=slots)


def output_format(name: str) -> Any:
    from sglang.srt.layers.moe.topk import TopKOutputFormat

    return TopKOutputFormat[name]


def own_routing(hidden_states: Any, gating_output: Any, topk: int, renormalize: bool) -> Any:
    return gating_output[:, :topk].float(), torch.arange(topk, dtype=torch.int32).expand(len(gating_output), -1).clone()


# What is changed of a config of grouped sigmoid routing with a bias, and the reason in the log.
REASONS: dict[str, tuple[dict[str, Any], str]] = {
    "custom": ({"custom_routing_function": own_routing}, "a routing function of the model's own"),
    "packed ids": ({"fused_gate_packed_ids": True}, "packed ids"),
    "bias": ({"correction_bias": bias_of(1).bfloat16()}, "correction bias in bfloat16"),
    "two shared": ({"shared_experts": 2}, "2 shared experts in the top-k"),
    "shared without bias": (
        {"shared_experts": 1, "correction_bias": None, "scoring_func": "softmax"},
        "shared experts in the top-k without a correction bias",
    ),
    "shared with sqrtsoftplus": (
        {"shared_experts": 1, "use_grouped_topk": False, "scoring_func": "sqrtsoftplus"},
        "a shared expert in the top-k with sqrtsoftplus",
    ),
    "softmax": (
        {"use_grouped_topk": False, "scoring_func": "softmax"},
        "softmax with a correction bias, which not all of SGLang's kernels add",
    ),
    "raw logits": (
        {
            "use_grouped_topk": False,
            "correction_bias": None,
            "scoring_func": "softmax",
            "runner_backend": TRTLLM_ROUTED,
        },
        "raw logits as weights, for flashinfer_trtllm_routed",
    ),
    "groups": (
        {"num_expert_group": 7},
        f"RouterSpec.n_group = 7; allowed: a divisor of the {EXPERTS} selectable experts",
    ),
    **{name: ({"output_format": name}, f"output format {name}") for name in ("BYPASSED", "TRITON_KERNEL", "PACKED")},
}


def changed(changes: dict[str, Any]) -> Any:
    top_k = top_k_of(bias_of(1), **GROUPED, scoring_func="sigmoid")
    for name, value in changes.items():
        if name == "output_format":
            value = output_format(value)
        elif name == "shared_experts":
            value = shared(value)
        setattr(top_k.topk_config, name, value)
    return top_k


def why(top_k: Any) -> str:
    from moegate.integrations.sglang.selection import Selection
    from moegate.integrations.takeover import LeftToEngineError

    with pytest.raises(LeftToEngineError) as caught:
        Selection(top_k.topk_config, EXPERTS, HIDDEN)
    return str(caught.value)


@pytest.mark.parametrize("name", REASONS)
def test_each_reason(name: str) -> None:
    changes, reason = REASONS[name]
    top_k = changed(changes)
    assert why(top_k) == reason
    if name != "groups":  # which SGLang cannot route either
        from sglang.kernels.spec import KernelBackend

        assert not top_k.backend_eligible(KernelBackend.PLUGIN, hidden_of(5), logits_of(5))


@pytest.mark.parametrize("name", ["custom", "bias", "packed ids", "two shared", "softmax"])
def test_sglang_routes_what_is_left(name: str) -> None:
    top_k, hidden, logits = changed(REASONS[name][0]), hidden_of(5), logits_of(5)
    torch.manual_seed(0)  # SGLang draws one of two shared experts
    backend, output = backend_of(top_k, hidden, logits)
    assert backend == "torch"
    torch.manual_seed(0)
    theirs = sglang_layers.own(top_k, hidden, logits)
    assert output.topk_ids.equal(theirs.topk_ids)
    assert output.topk_weights.equal(theirs.topk_weights)


@pytest.mark.parametrize(
    ("argument", "reason"),
    [("enable_deterministic_inference", "deterministic inference"), ("enable_symm_mem", "symmetric memory")],
)
def test_modes_of_the_server(argument: str, reason: str) -> None:
    from sglang.srt.runtime_context import get_context

    with get_context().override_server_args(**{argument: True}):
        top_k = top_k_of(bias_of(1), **GROUPED)
        assert why(top_k) == reason
        assert backend_of(top_k, hidden_of(5), logits_of(5))[0] == "torch"


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dynamic_expert_bias", torch.zeros(5, EXPERTS)), ("router_logits_partials", torch.zeros(1))],
)
def test_arguments_of_a_call(argument: str, value: torch.Tensor) -> None:
    from sglang.kernels.spec import KernelBackend

    top_k, hidden, logits = top_k_of(bias_of(1), **GROUPED, scoring_func="sigmoid"), hidden_of(5), logits_of(5)
    assert top_k.backend_eligible(KernelBackend.PLUGIN, hidden, logits)
    assert not top_k.backend_eligible(KernelBackend.PLUGIN, hidden, logits, **{argument: value})


@pytest.mark.parametrize(
    "logits", [logits_of(5, dtype=torch.float16), logits_of(5)[:, ::2].repeat(1, 2), logits_of(5).t().contiguous().t()]
)
def test_logits_that_moegate_does_not_select_by(logits: torch.Tensor) -> None:
    from sglang.kernels.spec import KernelBackend

    top_k, hidden = top_k_of(bias_of(1), **GROUPED), hidden_of(5)
    top_k(hidden, logits_of(5))
    is_whole = logits.dtype == torch.float32 and logits.stride(1) == 1
    assert top_k.backend_eligible(KernelBackend.PLUGIN, hidden, logits) == is_whole


def test_no_output_format_yet() -> None:
    """Before the experts are bound nothing is decided; SGLang's own forward says what is missing."""
    from sglang.kernels.spec import KernelBackend

    top_k, hidden, logits = top_k_of(bias_of(1), **GROUPED), hidden_of(5), logits_of(5)
    bound, top_k.topk_config.output_format = top_k.topk_config.output_format, None
    assert not top_k.backend_eligible(KernelBackend.PLUGIN, hidden, logits)
    top_k.topk_config.output_format = bound
    assert top_k.backend_eligible(KernelBackend.PLUGIN, hidden, logits)
