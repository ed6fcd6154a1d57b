"""The selections that SGLang is asked for in tests, and what SGLang's code for CUDA answers, without a GPU."""

from __future__ import annotations

import sys
from typing import Any

import torch._dynamo.config
from sglang_layers import GROUPED, TOP_K, bias_of, hidden_of, logits_of, top_k_of

SIGMOID: dict[str, Any] = {"scoring_func": "sigmoid"}
BIASED: dict[str, Any] = {**SIGMOID, "correction_bias": "score"}
GROUPS: dict[str, Any] = {"n_group": 8, "topk_group": 4}
EPS: dict[str, Any] = {"renormalize": True, "renormalize_eps": 1e-20}
SCALE: dict[str, Any] = {"routed_scaling_factor": 2.5, "apply_routed_scaling_factor_on_output": True}
# SGLang's TopK arguments, whether there is a correction bias, and the spec worked out by hand.
CASES: dict[str, tuple[dict[str, Any], bool, dict[str, Any]]] = {
    "deepseek-v3": ({**GROUPED, **SCALE}, True, {**BIASED, **GROUPS, **EPS, "routed_scaling_factor": 2.5}),
    "deepseek-v3, scaled later": ({**GROUPED, "routed_scaling_factor": 2.5}, True, {**BIASED, **GROUPS, **EPS}),
    "one group": (
        {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1, **SIGMOID},
        True,
        {**BIASED, **EPS},
    ),
    "deepseek-v2": ({**GROUPED, "renormalize": False}, False, {**GROUPS, "group_score": "max"}),
    "sigmoid by groups": ({**GROUPED, **SIGMOID}, False, {**SIGMOID, **GROUPS, **EPS, "group_score": "max"}),
    "qwen3": ({}, False, {"renormalize": True}),
    "qwen2": ({"renormalize": False}, False, {}),
    "softmax scaled": ({**SCALE}, False, {"renormalize": True, "routed_scaling_factor": 2.5}),
    "minimax-m2": (SIGMOID, True, {**BIASED, **EPS}),
    "sigmoid": (SIGMOID, False, {**SIGMOID, **EPS}),
    "sigmoid, not renormalized": ({**SIGMOID, "renormalize": False}, True, BIASED),
    "deepseek-v4": (
        {"scoring_func": "sqrtsoftplus", **SCALE},
        True,
        {**BIASED, **EPS, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 2.5},
    ),
}

TOKENS = 6


def asked() -> list[tuple[str, bool]]:
    """The cases that SGLang's code for CUDA is asked for, without and with a shared expert."""
    found = [(name, False) for name in CASES if name != "sigmoid"]  # for which its router asks for a bias
    # What moegate leaves to SGLang is not asked: no bias, or a column of padding that differs.
    return found + [(name, True) for name, (_, has_bias, _) in CASES.items() if has_bias and name != "deepseek-v4"]


def case_of(name: str, *, has_shared: bool = False) -> Any:
    """The `TopK` of a case; `has_shared`: with the column of a shared expert."""
    from sglang.srt.configs.shared_experts import SharedExpertsConfig

    arguments, has_bias, _ = CASES[name]
    top_k = top_k_of(bias_of(1) if has_bias else None, top_k=TOP_K + has_shared, **arguments)
    top_k.topk_config.shared_experts = SharedExpertsConfig(num_fused_shared_experts=int(has_shared))
    return top_k


class _Kernel:
    """A Triton kernel for the interpreter, which takes no None for a pointer that is not read."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def launch(scores: Any, *arguments: Any, **others: Any) -> None:
            given = (scores if argument is None else argument for argument in arguments)
            self._kernel[grid](scores, *given, **others)

        return launch


def answers_for_cuda(file: str) -> None:
    """Writes what `select_experts` returns on its way for CUDA: its Triton router runs in Triton's interpreter.

    Where SGLang prefers FlashInfer's selection, the router that it falls back to answers.
    """
    from importlib import import_module
    from unittest.mock import patch

    from sglang.srt.layers.moe import topk
    from sglang.srt.runtime_context import get_context

    torch._dynamo.config.disable = True
    router = import_module("sglang.kernels.ops.moe.moe_fused_gate")
    answers: dict[tuple[str, bool], Any] = {}
    with (
        get_context().override_server_args(),
        patch.multiple(topk, _is_cuda=True, _is_cpu=False, fused_topk_deepseek=None, create=True),
        patch.object(router, "_router_triton_kernel", _Kernel(router._router_triton_kernel)),
    ):
        padding = torch.tensor(TOKENS - 2, dtype=torch.int32)
        for name, has_shared in asked():
            config = case_of(name, has_shared=has_shared).topk_config
            output = topk.select_experts(
                hidden_of(TOKENS), logits_of(TOKENS), config, layer_id=3, num_token_non_padded=padding
            )
            answers[name, has_shared] = (output.topk_ids, output.topk_weights)
    torch.save(answers, file)


if __name__ == "__main__":
    import sglang_stubs

    sglang_stubs.install()
    answers_for_cuda(sys.argv[1])
