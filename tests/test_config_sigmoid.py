"""Configs of the types whose scores are sigmoids: what a config states is honoured, refused, or warned of."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest

from moegate import RouterSpec
from moegate.catalog.model_types import model_types, read_toml
from moegate.warn import warn_once

Config = dict[str, Any]


@pytest.fixture(autouse=True)
def _every_warning_anew() -> None:
    warn_once.cache_clear()


def silent_spec(config: Config, layer: int | None = None) -> RouterSpec:
    """The spec of a config of which nothing is warned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return RouterSpec.from_config(config, layer=layer)


def biased(hidden_size: int, num_experts: int, top_k: int, **more: Any) -> RouterSpec:
    """A spec with sigmoid scores and a bias for the choice, renormalised."""
    return RouterSpec(hidden_size, num_experts, top_k, "sigmoid", "score", renormalize=True, **more)


DEEPSEEK_V3: Config = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}
MINIMAX_M2: Config = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax",
    "hidden_size": 3072,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
}
TRINITY_NANO: Config = {
    "architectures": ["AfmoeForCausalLM"],
    "dtype": "bfloat16",
    "hidden_size": 1024,
    "model_type": "afmoe",
    "n_group": 1,
    "num_expert_groups": 1,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_limited_groups": 1,
    "num_shared_experts": 1,
    "route_norm": True,
    "route_scale": 2.826,
    "score_func": "sigmoid",
    "topk_group": 1,
}
HY3: Config = {
    "model_type": "hy_v3",
    "hidden_size": 4096,
    "num_experts": 192,
    "num_experts_per_tok": 8,
    "num_shared_experts": 1,
    "router_scaling_factor": 2.826,
    "route_norm": True,
    "moe_router_enable_expert_bias": True,
}
KIMI_LINEAR: Config = {
    "model_type": "kimi_linear",
    "hidden_size": 2304,
    "num_experts": 256,
    "num_experts_per_token": 8,
    "num_expert_group": 1,
    "topk_group": 1,
    "use_grouped_topk": True,
    "moe_router_activation_func": "sigmoid",
    "moe_renormalize": True,
    "routed_scaling_factor": 2.446,
}
LAGUNA: Config = {
    "model_type": "laguna",
    "hidden_size": 2048,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_routed_scaling_factor": 2.5,
    "moe_router_logit_softcapping": 0.0,
    "norm_topk_prob": True,
}
FLINT: Config = {
    "model_type": "flint",
    "hidden_size": 2048,
    "num_experts": 256,
    "num_experts_per_tok": 6,
    "norm_topk_prob": True,
    "router_score_function": "sigmoid",
}
DEEPSEEK_V4: Config = {
    "model_type": "deepseek_v4",
    "hidden_size": 4096,
    "n_routed_experts": 256,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "norm_topk_prob": True,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 1.5,
}
STEP35: Config = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "hidden_size": 4096,
    "moe_num_experts": 288,
    "moe_top_k": 8,
    "norm_expert_weight": True,
    "moe_router_activation": "sigmoid",
    "moe_router_scaling_factor": 3.0,
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
}
INKLING: Config = {
    "model_type": "inkling_text",
    "hidden_size": 6144,
    "n_routed_experts": 256,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "route_scale": 8.0,
    "use_gate_bias": True,
    "use_global_scale": True,
    "norm_after_topk": True,
    "gate_activation": "sigmoid",
    "shared_expert_sink": True,
}
DOTS1: Config = {
    "model_type": "dots1",
    "hidden_size": 4096,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "noaux_tc",
}

V3 = biased(7168, 256, 8, n_group=8, topk_group=4, renormalize_eps=1e-20, routed_scaling_factor=2.5)
M2 = biased(3072, 256, 8, weight_dtype="float32")
TRINITY = biased(1024, 128, 8, renormalize_eps=1e-20, routed_scaling_factor=2.826, logits_dtype="bfloat16")
HY = biased(4096, 192, 8, renormalize_eps=1e-20, routed_scaling_factor=2.826)
KIMI = biased(2304, 256, 8, renormalize_eps=1e-20, routed_scaling_factor=2.446)
LAGUNA_SPEC = biased(2048, 256, 8, routed_scaling_factor=2.5)
FLINT_SPEC = RouterSpec(2048, 256, 6, "sigmoid", renormalize=True, weight_dtype="float32")
V4 = RouterSpec(
    4096, 256, 6, "sqrtsoftplus", "score", renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=1.5
)
STEP = biased(4096, 288, 8, routed_scaling_factor=3.0, weight_dtype="float32")
INKLING_SPEC = biased(6144, 256, 6, num_shared_gates=2, global_scale=True, routed_scaling_factor=8.0)
DOTS = biased(4096, 128, 6, renormalize_eps=1e-20, routed_scaling_factor=2.5)

# What each config says in full, and then one key at a time that says something else.
HONOURED: dict[str, tuple[Config, RouterSpec]] = {
    "V3": (DEEPSEEK_V3, V3),
    "V3, greedy": (
        {**DEEPSEEK_V3, "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
        replace(V3, n_group=1, topk_group=1, correction_bias=None, group_score="max"),
    ),
    "V3, group_limited_greedy": (
        {**DEEPSEEK_V3, "topk_method": "group_limited_greedy"},
        replace(V3, correction_bias=None, group_score="max"),
    ),
    "V3.2, greedy": (
        {**DEEPSEEK_V3, "model_type": "deepseek_v32", "topk_method": "greedy"},
        replace(V3, correction_bias=None, group_score="max"),
    ),
    "V3, no method": ({**DEEPSEEK_V3, "topk_method": None}, V3),
    "M2 as minimax": (MINIMAX_M2, M2),
    "M2 as minimax, no architectures": ({**MINIMAX_M2, "architectures": None}, M2),
    "M2 as minimax, by its bias alone": (
        {key: value for key, value in MINIMAX_M2.items() if key not in ("architectures", "scoring_func")},
        M2,
    ),
    "M2": ({**MINIMAX_M2, "model_type": "minimax_m2"}, M2),
    "M2, softmax": (
        {**MINIMAX_M2, "model_type": "minimax_m2", "scoring_func": "softmax"},
        replace(M2, scoring_func="softmax"),
    ),
    "M2, no bias": (
        {**MINIMAX_M2, "model_type": "minimax_m2", "use_routing_bias": False},
        replace(M2, correction_bias=None),
    ),
    "Trinity": (TRINITY_NANO, TRINITY),
    "Trinity, not renormalised": (
        {**TRINITY_NANO, "route_norm": False},
        replace(TRINITY, renormalize=False, renormalize_eps=0.0),
    ),
    "Trinity, softmax": (
        {**TRINITY_NANO, "score_func": "softmax"},
        replace(TRINITY, scoring_func="softmax", renormalize=False, renormalize_eps=0.0),
    ),
    "Trinity, groups": (
        {**TRINITY_NANO, "n_group": 8, "topk_group": 4},
        replace(TRINITY, n_group=8, topk_group=4),
    ),
    "Hy3": (HY3, HY),
    "Hy3, not renormalised": (
        {**HY3, "route_norm": False},
        replace(HY, renormalize=False, renormalize_eps=0.0),
    ),
    "Kimi-Linear": (KIMI_LINEAR, KIMI),
    "Kimi-Linear, softmax": (
        {**KIMI_LINEAR, "moe_router_activation_func": "softmax"},
        replace(KIMI, scoring_func="softmax"),
    ),
    "Kimi-Linear, groups switched off": (
        {**KIMI_LINEAR, "num_expert_group": 8, "topk_group": 4, "use_grouped_topk": False},
        KIMI,
    ),
    "Kimi-K3, softmax": (
        {"model_type": "kimi_k3", "text_config": {**KIMI_LINEAR, "moe_router_activation_func": "softmax"}},
        replace(KIMI, scoring_func="softmax"),
    ),
    "Laguna": (LAGUNA, LAGUNA_SPEC),
    "Laguna, sqrtsoftplus": (
        {**LAGUNA, "moe_router_score_func": "sqrtsoftplus"},
        replace(LAGUNA_SPEC, scoring_func="sqrtsoftplus"),
    ),
    "Flint": (FLINT, FLINT_SPEC),
    "Flint, softmax": ({**FLINT, "router_score_function": "softmax"}, replace(FLINT_SPEC, scoring_func="softmax")),
    "V4": (DEEPSEEK_V4, V4),
    "V4, not renormalised": (
        {**DEEPSEEK_V4, "norm_topk_prob": False},
        replace(V4, renormalize=False, renormalize_eps=0.0),
    ),
    "V4, sigmoid": ({**DEEPSEEK_V4, "scoring_func": "sigmoid"}, replace(V4, scoring_func="sigmoid")),
    "V4, greedy": ({**DEEPSEEK_V4, "topk_method": "greedy"}, replace(V4, correction_bias=None)),
    "Step-3.5": (STEP35, STEP),
    "Step-3.5, softmax": ({**STEP35, "moe_router_activation": "softmax"}, replace(STEP, scoring_func="softmax")),
    "Step-3.5, no bias": ({**STEP35, "use_moe_router_bias": False}, replace(STEP, correction_bias=None)),
    "Step-3.5, not renormalised": ({**STEP35, "norm_expert_weight": False}, replace(STEP, renormalize=False)),
    "Inkling": (INKLING, INKLING_SPEC),
    "Inkling, no bias": ({**INKLING, "use_gate_bias": False}, replace(INKLING_SPEC, correction_bias=None)),
    "Inkling, no scale": ({**INKLING, "use_global_scale": False}, replace(INKLING_SPEC, global_scale=False)),
    "dots.llm1": (DOTS1, DOTS),
    "dots.llm1, the score by its name": ({**DOTS1, "scoring_func": "sigmoid"}, DOTS),
}


@pytest.mark.parametrize("name", HONOURED)
def test_what_is_stated_is_honoured(name: str) -> None:
    config, expected = HONOURED[name]
    assert silent_spec(config) == expected


REFUSED: dict[str, tuple[Config, str]] = {
    "V3, another method": ({**DEEPSEEK_V3, "topk_method": "sinkhorn"}, "topk_method = 'sinkhorn'; allowed"),
    "GLM, greedy": (
        {"model_type": "glm4_moe", "n_routed_experts": 128, "topk_method": "greedy"},
        "topk_method = 'greedy'; allowed for correction_bias: noaux_tc",
    ),
    "M2, another score": (
        {**MINIMAX_M2, "model_type": "minimax_m2", "scoring_func": "tanh"},
        "scoring_func = 'tanh'; allowed for scoring_func: sigmoid, softmax, sqrtsoftplus",
    ),
    "Trinity, another score": ({**TRINITY_NANO, "score_func": "relu"}, "score_func = 'relu'; allowed"),
    "Kimi-Linear, another score": (
        {**KIMI_LINEAR, "moe_router_activation_func": "relu"},
        "moe_router_activation_func = 'relu'; allowed",
    ),
    "Laguna, another score": ({**LAGUNA, "moe_router_score_func": "softmax"}, "moe_router_score_func = 'softmax'"),
    "Flint, another score": ({**FLINT, "router_score_function": "relu"}, "router_score_function = 'relu'"),
    "V4, the logit itself": ({**DEEPSEEK_V4, "scoring_func": "identity"}, "scoring_func = 'identity'; allowed"),
    "Inkling, softmax": ({**INKLING, "gate_activation": "softmax"}, "gate_activation = 'softmax'; allowed"),
    "Inkling, not renormalised": ({**INKLING, "norm_after_topk": False}, "norm_after_topk = False; allowed"),
    "dots.llm1, softmax": ({**DOTS1, "scoring_func": "softmax"}, "scoring_func = 'softmax'; allowed"),
    # https://huggingface.co/nvidia/Nemotron-H-56B-Base-8K config.json
    "Nemotron-H 56B": (
        {"model_type": "nemotron_h", "hidden_size": 8192, "hybrid_override_pattern": "M-M-M*-"},
        r"no experts \(hybrid_override_pattern has no 'E'\)",
    ),
    "Nemotron-H 56B, saved with the defaults of its class": (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M-M*-", "n_routed_experts": 8},
        r"no experts \(hybrid_override_pattern has no 'E'\)",
    ),
    "Nemotron-H 56B, saved by Transformers": (
        {"model_type": "nemotron_h", "layers_block_type": ["mamba", "mlp", "attention"], "n_routed_experts": 8},
        r"no experts \(layers_block_type has no 'moe'\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_reader_understands_is_refused(name: str) -> None:
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        RouterSpec.from_config(config)


WARNED: dict[str, tuple[Config, str]] = {
    "Laguna, not renormalised": ({**LAGUNA, "norm_topk_prob": False}, "norm_topk_prob = false is not followed"),
    "Hy3, no bias": (
        {**HY3, "moe_router_enable_expert_bias": False},
        "moe_router_enable_expert_bias = false is not followed",
    ),
    "M2, not renormalised": (
        {**MINIMAX_M2, "model_type": "minimax_m2", "norm_topk_prob": False},
        "norm_topk_prob = false is not followed",
    ),
    "V4, groups": ({**DEEPSEEK_V4, "n_group": 8}, "n_group = 8 is not followed; the router has n_group = 1"),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_nobody_follows_is_warned_of(name: str) -> None:
    config, message = WARNED[name]
    with pytest.warns(RuntimeWarning, match=message):
        RouterSpec.from_config(config)


def test_minimax_text_01_stays_softmax() -> None:
    """The type is older than MiniMax-M2."""
    text_01: Config = {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        "hidden_size": 6144,
        "num_local_experts": 32,
        "num_experts_per_tok": 2,
    }
    assert silent_spec(text_01) == RouterSpec(6144, 32, 2, "softmax", renormalize=True)


def test_a_nemotron_with_experts_among_its_layers() -> None:
    config: Config = {
        "model_type": "nemotron_h",
        "hidden_size": 2688,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "routed_scaling_factor": 2.5,
    }
    expected = biased(2688, 128, 6, renormalize_eps=1e-20, routed_scaling_factor=2.5)
    for layers in ({"hybrid_override_pattern": "MEM*E"}, {"layers_block_type": ["mamba", "moe", "attention"]}, {}):
        assert silent_spec({**config, **layers}) == expected


@pytest.mark.parametrize("kind", ["deepseek_v3", "sigmoid", "sqrtsoftplus"])
def test_each_difference_is_of_a_key_that_is_read(kind: str) -> None:
    for name in read_toml(f"types/{kind}.toml"):
        entry = model_types()[name]
        for key, engines in entry.differs.items():
            assert key in entry.read_keys, f"{name}: {key}"
            followed = engines["follows"].split(",")[0]
            assert "ignores" not in engines[followed], f"{name}: {key}"
