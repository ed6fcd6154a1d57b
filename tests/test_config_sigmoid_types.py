"""Types with sigmoid routers (and near relatives) that vLLM, SGLang, mlx-lm or Transformers 5.24 know."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from sigmoid_configs import Config
from sigmoid_types import (
    DEEPSEEK_SPEC,
    MUSE,
    PUZZLE,
    PUZZLE_SPEC,
    RING,
    RING_SPEC,
    TYPES,
    V41,
    V41_SPEC,
    WRAPPED,
)

from moegate import RouterSpec
from moegate.configs.model_types import routing_keys
from moegate.warn import warn_once


def silent_spec(config: Config, layer: int | None = None) -> RouterSpec:
    warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return RouterSpec.from_config(config, layer=layer)


@pytest.mark.parametrize("model_type", TYPES)
def test_type(model_type: str) -> None:
    config, expected = TYPES[model_type]
    assert silent_spec({**config, "model_type": model_type}) == expected


@pytest.mark.parametrize("model_type", TYPES)
def test_the_number_of_experts_is_not_invented(model_type: str) -> None:
    counting = [key.split(".")[0] for key in routing_keys().states["num_experts"]]
    config = {key: value for key, value in TYPES[model_type][0].items() if key not in counting}
    with pytest.raises(ValueError, match="no experts"):
        RouterSpec.from_config({**config, "model_type": model_type})


@pytest.mark.parametrize("model_type", WRAPPED)
def test_wrapper(model_type: str) -> None:
    key, inner = WRAPPED[model_type]
    config, expected = TYPES[inner]
    assert silent_spec({"model_type": model_type, key: config}) == expected


def test_deepseek_v41_has_no_hash_layers() -> None:
    config = {**V41, "model_type": "deepseek_v41", "num_hash_layers": 3}
    assert RouterSpec.from_config(config, layer=0) == V41_SPEC


def test_layers_of_a_puzzle_differ() -> None:
    assert silent_spec(PUZZLE, layer=1) == replace(PUZZLE_SPEC, top_k=4)
    assert silent_spec(PUZZLE, layer=3) == replace(PUZZLE_SPEC, top_k=22)
    with pytest.raises(ValueError, match=r"num_experts_per_tok differs between layers \(\[4, 22\]\); name the layer"):
        RouterSpec.from_config(PUZZLE)
    with pytest.raises(ValueError, match=r"layer = 4; allowed: 0 to 3, for block_configs lists 4 layers"):
        RouterSpec.from_config(PUZZLE, layer=4)
    same = [{**block, "num_experts_per_tok": 6, "n_routed_experts": 256} for block in PUZZLE["block_configs"]]
    assert silent_spec({**PUZZLE, "block_configs": same}) == replace(PUZZLE_SPEC, top_k=6, num_experts=256)


def test_a_puzzle_without_blocks_has_no_top_k() -> None:
    """The class of Nemotron-H has a default, which does not apply."""
    config = {key: value for key, value in PUZZLE.items() if key != "block_configs"}
    with pytest.raises(ValueError, match="no num_experts_per_tok, and no default for top_k"):
        RouterSpec.from_config(config)


@pytest.mark.parametrize(
    ("model_type", "stated", "message"),
    [
        ("llada2_moe", {"expert_capacity": 64}, "expert_capacity = 64; allowed for top_k: null"),
        ("deepseek_v41", {"gate_temp": 2.0}, "gate_temp = 2.0; allowed for logit_multiplier"),
        ("musespark1x_text", {"metap": {"use_metap": True}}, "metap.use_metap = True; allowed for logit_multiplier"),
        ("musespark1x_text", {"moe": {**MUSE["moe"], "is_enabled": False}}, r"no experts \(moe.is_enabled = false\)"),
        ("alice_ai", {"router_bias_correction": False}, "router_bias_correction = False; allowed"),
        ("alice_ai", {"router_score_function": "softmax"}, "router_score_function = 'softmax'; allowed"),
        ("k2_horizon", {"router_score_func": "relu"}, "router_score_func = 'relu'; allowed"),
        ("gigachat3_5", {"scoring_func": "softmax"}, "scoring_func = 'softmax'; allowed"),
    ],
)
def test_what_no_reader_understands_is_refused(model_type: str, stated: Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec.from_config({**TYPES[model_type][0], **stated, "model_type": model_type})


@pytest.mark.parametrize(
    ("model_type", "stated", "change"),
    [
        ("bailing_moe_v2", {"norm_topk_prob": False}, {"renormalize": False, "renormalize_eps": 0.0}),
        ("bailing_moe_v2_5", {"norm_topk_prob": False}, {"renormalize": False, "renormalize_eps": 0.0}),
        ("bailing_moe_v2_5", {"moe_router_enable_expert_bias": False}, {"correction_bias": None}),
        ("bailing_hybrid", {"score_function": "softmax"}, {"scoring_func": "softmax"}),
        ("bailing_hybrid", {"moe_router_enable_expert_bias": False}, {"correction_bias": None}),
        ("sarvam_moe", {"norm_topk_prob": False}, {"renormalize": False, "renormalize_eps": 0.0}),
    ],
)
def test_keys_of_ling_and_its_relatives(model_type: str, stated: Config, change: Config) -> None:
    plain = {key: value for key, value in RING.items() if key not in ("scoring_func", "topk_method")}
    assert silent_spec({**plain, **stated, "model_type": model_type}) == replace(RING_SPEC, **change)


def test_scores_of_dots3_notes_vision_tower() -> None:
    """vLLM 0.33.0 models/dots3_note/nvidia/vision.py: MoESwiGLUFFN."""
    config: Config = {
        "model_type": "dots3_note_vision_encoder",
        "embed_dim": 1536,
        "pyramid_num_routed": [64, 64],
        "capacity_factor": 2,
        "router_scale": 1.5,
    }
    expected = replace(
        DEEPSEEK_SPEC,
        hidden_size=1536,
        num_experts=64,
        top_k=2,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.5,
    )
    assert silent_spec({**config, "router_scoring_func": "sigmoid"}) == expected
    plain = replace(expected, scoring_func="softmax", renormalize=False, renormalize_eps=0.0)
    assert silent_spec({**config, "router_scoring_func": "softmax"}) == plain


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("BailingMoeV2_5ForCausalLM", "bailing_moe_v2_5"),
        ("LLaDA2MoeModelLM", "llada2_moe"),
        ("PanguUltraMoEForCausalLM", "pangu_ultra_moe"),
        ("Step5ForCausalLM", "step5"),
    ],
)
def test_a_class_names_its_type(architecture: str, model_type: str) -> None:
    config, expected = TYPES[model_type]
    assert silent_spec({**config, "architectures": [architecture]}) == expected
