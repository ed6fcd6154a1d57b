"""Configs that are refused, and the names in the errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_configs import QWEN, RING, V3, V4

from moegate import RouterSpec


def test_values_that_json_does_not_have() -> None:
    deep: dict[str, Any] = {}
    deep["text_config"] = deep
    with pytest.raises(ValueError, match="nested too deeply"):
        RouterSpec.from_config(deep)
    for config in ({**QWEN, "model_type": {(1, 2): 3}}, {**V3, "scoring_func": {(1, 2): 3}}):
        with pytest.raises(ValueError, match=r"a dict|\{\(1, 2\): 3\}"):
            RouterSpec.from_config(config)
    with pytest.raises(TypeError, match="to_dict"):
        RouterSpec.from_config(SimpleNamespace(to_dict=lambda: [1]))
    with pytest.raises(ValueError, match="unknown model_type 'other'"):
        RouterSpec.from_config({"model_type": "other", "num_experts": torch.ones(2)})


def test_texts_that_read_as_other_values_are_none_of_them() -> None:
    minimax = {"model_type": "minimax_m2", "hidden_size": 64, "num_local_experts": 16}
    for text in ("false", "true", "null", "0"):
        with pytest.raises(ValueError, match="use_routing_bias = "):
            RouterSpec.from_config({**minimax, "use_routing_bias": text})
    for first in (2.0, "2", [2], True):
        with pytest.raises(ValueError, match=r"num_hash_layers = .*allowed: an int, or null"):
            RouterSpec.from_config({**V4, "num_hash_layers": first}, layer=2)


def test_an_error_names_the_key_that_it_comes_from() -> None:
    with pytest.raises(
        ValueError, match=r"RouterSpec\.num_experts must be int, got str '16' \(read from n_routed_experts\)"
    ):
        RouterSpec.from_config({**V3, "n_routed_experts": "16"})


def test_a_composite_type_around_an_unknown_one() -> None:
    inner = {"model_type": "other", "num_experts": 8}
    with pytest.raises(ValueError, match=r"unknown model_type 'other'; did you mean 'aria_text'"):
        RouterSpec.from_config({"model_type": "aria", "text_config": inner})
    with pytest.raises(ValueError, match="'llama4' is a composite type, and there is no text_config"):
        RouterSpec.from_config({"model_type": "llama4", "num_local_experts": 16})
    small = {"model_type": "smallthinker", "hidden_size": 64, "moe_num_primary_experts": 32}
    with pytest.raises(ValueError, match="unknown model_type 'smallthinker'"):
        RouterSpec.from_config(small)


@pytest.mark.parametrize("contradiction", [{"score_function": "softmax"}, {"score_function": "tanh"}])
def test_ring_that_contradicts_itself(contradiction: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"score_function = .*; allowed for scoring_func"):
        RouterSpec.from_config({**RING, **contradiction})


def test_unknown_type_suggests_close_ones() -> None:
    with pytest.raises(ValueError, match="unknown model_type 'deepseek_v5'; did you mean 'deepseek_v") as caught:
        RouterSpec.from_config({**V3, "model_type": "deepseek_v5"})
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="'some_composite', 'llama': this model has no experts"):
        RouterSpec.from_config({"model_type": "some_composite", "text_config": {"model_type": "llama"}})
    for nameless in ({}, {"model_type": None}, {"hidden_size": 64}):
        with pytest.raises(ValueError, match="no model_type"):
            RouterSpec.from_config(nameless)


def test_a_field_without_value_or_default() -> None:
    ring = {key: value for key, value in RING.items() if key != "num_experts"}
    with pytest.raises(ValueError, match="'bailing_moe_v2': no num_experts, which a config with experts states"):
        RouterSpec.from_config(ring)


@pytest.mark.parametrize(
    ("field", "value"), [("hidden_size", "64"), ("n_group", 3), ("num_experts_per_tok", 17), ("norm_topk_prob", "yes")]
)
def test_values_that_make_no_sense(field: str, value: object) -> None:
    with pytest.raises(ValueError, match="config of model_type 'deepseek_v3': RouterSpec"):
        RouterSpec.from_config({**V3, field: value})


def test_a_score_that_the_model_does_not_have_is_refused() -> None:
    """Configs of the original code state scoring_func; a class that ignored another score would route wrongly."""
    deepseek = {"model_type": "deepseek_v3", "n_routed_experts": 256}
    assert RouterSpec.from_config({**deepseek, "scoring_func": "sigmoid"}) == RouterSpec.from_config(deepseek)
    with pytest.raises(ValueError, match="scoring_func = 'softmax'; allowed for scoring_func: sigmoid"):
        RouterSpec.from_config({**deepseek, "scoring_func": "softmax"})
