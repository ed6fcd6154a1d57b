"""Configs of types with sigmoid scores: each stated key is followed, refused, or warned of."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from sigmoid_configs import (
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    DOTS,
    DOTS1,
    FLINT,
    FLINT_SPEC,
    HY,
    HY3,
    INKLING,
    INKLING_SPEC,
    KIMI,
    KIMI_LINEAR,
    LAGUNA,
    LAGUNA_SPEC,
    M2,
    MINIMAX_M2,
    STEP,
    STEP35,
    TRINITY,
    TRINITY_NANO,
    V3,
    V4,
    Config,
    biased,
)

from moegate import RouterSpec
from moegate.configs.model_types import model_types, read_tables
from moegate.warn import warn_once


@pytest.fixture(autouse=True)
def _every_warning_anew() -> None:
    warn_once.cache_clear()


def silent_spec(config: Config, layer: int | None = None) -> RouterSpec:
    """The spec of a config, which must cause no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return RouterSpec.from_config(config, layer=layer)


# The spec of each config, then of the config with one key changed at a time.
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
    "Hy3, no sigmoid": ({**HY3, "moe_router_use_sigmoid": False}, "moe_router_use_sigmoid = False; allowed"),
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
    """The type is older than MiniMax-M2, and has another router."""
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
    inner = {key: value for key, value in config.items() if key != "model_type"}
    assert silent_spec({"model_type": "nemotron_h_omni", "text_config": inner}) == expected


@pytest.mark.parametrize("kind", ["deepseek_v3", "sigmoid", "sqrtsoftplus"])
def test_each_difference_is_of_a_key_that_is_read(kind: str) -> None:
    for name in read_tables(kind):
        entry = model_types()[name]
        for key, engines in entry.differs.items():
            assert key in entry.read_keys, f"{name}: {key}"
            followed = engines["follows"].split(",")[0]
            assert "ignores" not in engines[followed], f"{name}: {key}"
