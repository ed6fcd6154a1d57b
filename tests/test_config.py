"""From a config.json to a spec: in every form that a config has, for every model type, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers_routers
from router_cases import Case, tiny_cases
from small_configs import counting_experts
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moegate import RouterSpec

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
V3_SPEC = RouterSpec(
    hidden_size=64,
    num_experts=16,
    top_k=4,
    scoring_func="sigmoid",
    correction_bias="score",
    n_group=4,
    topk_group=2,
    renormalize=True,
    renormalize_eps=1e-20,
    routed_scaling_factor=2.5,
)
QWEN: dict[str, Any] = {"model_type": "qwen3_moe", "hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
QWEN_SPEC = RouterSpec(hidden_size=64, num_experts=16, top_k=4)
HUNYUAN: dict[str, Any] = {"model_type": "hunyuan_v1_moe", "hidden_size": 64, "num_experts": 16}
V4: dict[str, Any] = {"model_type": "deepseek_v4", "n_routed_experts": 256}
RING: dict[str, Any] = {
    "model_type": "bailing_moe",
    "hidden_size": 2048,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "moe_router_enable_expert_bias": True,
    "score_function": "sigmoid",
}

# What the config classes themselves leave open.
OPEN = {
    "deepseek_ocr2_text": {"num_experts_per_tok": 6},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma_text": {"num_experts": 8, "top_k_experts": 2},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2},
    "gemma4_text": {"num_experts": 8, "top_k_experts": 2},
    "hunyuan_v1_moe": {"num_experts": 8},
}
# What a config class says that has no experts by default.
WITH_EXPERTS = {"gemma4_text": {"enable_moe_block": True}}


@pytest.mark.parametrize("model_type", transformers_routers.model_types())
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    """All but the number of experts, which published files state, and which has none."""
    needed = OPEN.get(model_type, {})
    for left_out in needed:
        rest = WITH_EXPERTS.get(model_type, {}) | {key: value for key, value in needed.items() if key != left_out}
        counted = {key: count for key, count in counting_experts(model_type, 8).items() if key not in needed}
        for config in (CONFIG_MAPPING[model_type](**rest), {"model_type": model_type, **counted, **rest}):
            with pytest.raises(ValueError, match=f"no {left_out}|no experts"):
                RouterSpec.from_config(config)
    needed = needed | WITH_EXPERTS.get(model_type, {})
    spec = RouterSpec.from_config(CONFIG_MAPPING[model_type](**needed))
    counted = counting_experts(model_type, spec.num_experts)
    assert spec == RouterSpec.from_config({"model_type": model_type, **needed, **counted})
    for count in (None, 0):
        with pytest.raises(ValueError, match="no experts"):
            RouterSpec.from_config({"model_type": model_type, **needed, **counting_experts(model_type, count)})


@pytest.mark.parametrize("case", [c for c in tiny_cases() if c.dtype == "float32"], ids=lambda c: c.name)
def test_part_of_a_config(case: Case, tmp_path: Path) -> None:
    """A config of some keys says what the config class, which fills in the others, makes of them; so does its file."""
    config = CONFIG_MAPPING[case.model_type](**case.overrides)
    spec = RouterSpec.from_config({"model_type": case.model_type, **case.overrides}, layer=case.layer)
    assert spec == RouterSpec.from_config(config, layer=case.layer)
    config.save_pretrained(tmp_path)
    assert spec == RouterSpec.from_config(tmp_path, layer=case.layer)


def test_forms_of_a_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(V3), encoding="utf-8")
    keyed = SimpleNamespace(to_dict=lambda: V3)
    for config in (V3, keyed, file, str(file), tmp_path, str(tmp_path)):
        assert RouterSpec.from_config(config) == V3_SPEC
    with pytest.raises(TypeError, match="must be a path, a dict or a configuration with to_dict"):
        RouterSpec.from_config(3)
    with pytest.raises(ValueError, match=r"no file .*config\.json"):
        RouterSpec.from_config(tmp_path / "other" / "config.json")


@pytest.mark.parametrize("path", ["text_config", "language_config", "llm_config", "thinker_config.text_config"])
def test_nested_config(path: str) -> None:
    inner = QWEN
    for name in reversed(path.split(".")):
        inner = {"model_type": "some_composite", "vision_config": {"model_type": "mixtral"}, name: inner}
    assert RouterSpec.from_config(inner) == QWEN_SPEC
    rounded = replace(QWEN_SPEC, logits_dtype="bfloat16")
    assert RouterSpec.from_config({**inner, "dtype": "bfloat16"}) == rounded
    assert RouterSpec.from_config({"dtype": "bfloat16", "text_config": {**QWEN, "dtype": None}}) == rounded
    assert RouterSpec.from_config({"dtype": "bfloat16", "text_config": {**QWEN, "dtype": "float32"}}) == QWEN_SPEC


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_of_the_model(key: str) -> None:
    for dtype in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        assert RouterSpec.from_config({**QWEN, key: dtype}).logits_dtype == "bfloat16"
    for other in ("float16", "float32", torch.float32, None):
        assert RouterSpec.from_config({**QWEN, key: other}).logits_dtype == "float32"
    assert RouterSpec.from_config({**V3, key: "bfloat16"}).logits_dtype == "float32"  # the class upcasts


def test_deepseek_v3_does_not_save_its_score_function() -> None:
    saved = CONFIG_MAPPING["deepseek_v3"](**V3).to_dict()
    assert "scoring_func" not in saved
    assert RouterSpec.from_config(saved) == V3_SPEC


def test_qwen3_moe_calls_its_experts_local() -> None:
    saved = CONFIG_MAPPING["qwen3_moe"](**QWEN).to_dict()
    assert saved["num_local_experts"] == 16
    assert "num_experts" not in saved
    assert RouterSpec.from_config(saved) == QWEN_SPEC
    assert RouterSpec.from_config({**QWEN, "num_local_experts": 8}).num_experts == 8


def test_null_is_one_group_and_no_factor() -> None:
    config = {**V3, "n_group": None, "topk_group": None, "routed_scaling_factor": None}
    assert RouterSpec.from_config(config) == replace(V3_SPEC, n_group=1, topk_group=1, routed_scaling_factor=1.0)
    assert RouterSpec.from_config({**V3, "num_experts_per_tok": None}).top_k == 8  # as if it were absent


def test_without_renormalization_there_is_no_epsilon() -> None:
    spec = RouterSpec.from_config({**V3, "norm_topk_prob": False})
    assert spec == replace(V3_SPEC, renormalize=False, renormalize_eps=0.0)


def test_greedy_choice_knows_no_groups() -> None:
    v2 = {**V3, "model_type": "deepseek_v2"}
    assert RouterSpec.from_config({**v2, "topk_method": "group_limited_greedy"}).n_group == 4
    for config in (v2, {**v2, "topk_method": "greedy"}):  # "greedy" is the config class's default
        assert (RouterSpec.from_config(config).n_group, RouterSpec.from_config(config).topk_group) == (1, 1)
    with pytest.raises(ValueError, match=r"'topk'; allowed for n_group: .*group_limited_greedy, noaux_tc"):
        RouterSpec.from_config({**v2, "topk_method": "topk"})


@pytest.mark.parametrize(("softcapping", "expected"), [(0.0, None), (0, None), (None, None), (30.0, 30.0)])
def test_soft_cap(softcapping: float | None, expected: float | None) -> None:
    config = {"model_type": "laguna", "num_experts": 16, "moe_router_logit_softcapping": softcapping}
    assert RouterSpec.from_config(config).logit_softcapping == expected


def test_hash_layers() -> None:
    hashed = [RouterSpec.from_config({**V4, "num_hash_layers": 2}, layer=layer).hash_routing for layer in range(5)]
    assert hashed == [True, True, False, False, False]
    by_default = [RouterSpec.from_config(V4, layer=layer).hash_routing for layer in range(5)]
    assert by_default == [True, True, True, False, False]
    saved = CONFIG_MAPPING["deepseek_v4"](num_hidden_layers=8, num_hash_layers=2).to_dict()
    assert [RouterSpec.from_config(saved, layer=layer).hash_routing for layer in range(8)] == [True] * 2 + [False] * 6

    first, last = (RouterSpec.from_config(V4, layer=layer) for layer in (0, 3))
    assert first == replace(last, hash_routing=True, correction_bias=None)
    assert RouterSpec.from_config(V4) == last == RouterSpec.from_config(saved)  # the rule that most layers follow
    with pytest.raises(ValueError, match="layer = 8; allowed: 0 to 7"):
        RouterSpec.from_config(saved, layer=8)


def test_lists_by_layer() -> None:
    same = {**HUNYUAN, "moe_topk": [4, 4, 4]}
    assert RouterSpec.from_config(same) == RouterSpec.from_config({**HUNYUAN, "moe_topk": 4})
    differing = {**HUNYUAN, "num_experts": [16, 32], "moe_topk": [4, 2]}
    first, second = (RouterSpec.from_config(differing, layer=layer) for layer in (0, 1))
    assert (first.num_experts, first.top_k, second.num_experts, second.top_k) == (16, 4, 32, 2)
    with pytest.raises(ValueError, match=r"num_experts differs between layers \(\[16, 32\]\); name the layer"):
        RouterSpec.from_config(differing)
    for layer, allowed in ((2, "0 to 1"), (-1, "0 or more")):
        with pytest.raises(ValueError, match=f"layer = {layer}; allowed: {allowed}"):
            RouterSpec.from_config(differing, layer=layer)
    with pytest.raises(ValueError, match="moe_topk is an empty list"):
        RouterSpec.from_config({**HUNYUAN, "moe_topk": []})


def test_a_pair_is_no_list_of_layers() -> None:
    """ERNIE-4.5-VL counts its experts for text and for images."""
    for moe_num_experts in ([64, 32], 64):
        config = {"model_type": "ernie4_5_moe_vl", "hidden_size": 2560, "moe_num_experts": moe_num_experts, "moe_k": 6}
        for layer in (None, 1, 5):
            assert RouterSpec.from_config(config, layer=layer).num_experts == 64


def test_the_nearest_dtype_counts() -> None:
    mixtral = {"model_type": "mixtral", "num_local_experts": 8}
    for config, logits_dtype in (
        (mixtral, "float32"),
        ({**mixtral, "torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "bfloat16", "text_config": mixtral}, "bfloat16"),
        ({"dtype": "bfloat16", "text_config": {**mixtral, "torch_dtype": "float32"}}, "float32"),
        ({"dtype": "bfloat16", "text_config": {**mixtral, "dtype": None}}, "bfloat16"),
        ({"thinker_config": {"dtype": "bfloat16", "text_config": mixtral}}, "bfloat16"),
        ({**mixtral, "dtype": "float16"}, "float32"),
    ):
        assert RouterSpec.from_config(config).logits_dtype == logits_dtype


def test_layers_by_a_table_or_a_list_of_theirs() -> None:
    """Transformers takes numbers for keys, a file has texts; what some layers say is not the rule of the others."""
    own = {"num_experts_per_tok": 1}
    for layers in ({3: own}, {"3": own}, [{}, {}, {}, own]):
        config = {**QWEN, "per_layer_config": layers}
        assert [RouterSpec.from_config(config, layer=layer).top_k for layer in (0, 3)] == [4, 1]
    every = {**QWEN, "num_hidden_layers": 2, "per_layer_config": {"0": own, "1": own}}
    assert RouterSpec.from_config(every).top_k == 1
    with pytest.raises(ValueError, match="num_experts_per_tok differs between layers"):
        RouterSpec.from_config({**every, "per_layer_config": {"0": own, "1": {}}})
    for wrong in (3, "0", {"0": 3}, [None]):
        with pytest.raises(ValueError, match=r"per_layer_config = .*allowed: a dict of dicts"):
            RouterSpec.from_config({**QWEN, "per_layer_config": wrong})
    blocks = {**QWEN, "block_configs": [own, {}, None]}
    assert [RouterSpec.from_config(blocks, layer=layer).top_k for layer in (0, 1, 2)] == [1, 4, 4]
    with pytest.raises(ValueError, match="num_experts_per_tok differs between layers"):
        RouterSpec.from_config(blocks)


@pytest.mark.parametrize("layer", ["3", 3.0, True])
def test_a_layer_that_is_none(layer: Any) -> None:
    with pytest.raises(TypeError, match=r"layer: got .*; allowed: an int"):
        RouterSpec.from_config(QWEN, layer=layer)


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


@pytest.mark.parametrize(("dtype", "logits"), [("fp32", "float32"), ("bf16", "bfloat16"), (None, "float32")])
def test_the_dtype_of_a_router(dtype: str | None, logits: str) -> None:
    ring = {**RING, "model_type": "bailing_moe_v2", "dtype": "bfloat16", "router_dtype": dtype}
    assert RouterSpec.from_config(ring).logits_dtype == logits
    if dtype is not None:
        lite = {"model_type": "bailing_moe", "hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
        spec = RouterSpec.from_config({**lite, "dtype": "bfloat16", "norm_topk_prob": True, "router_dtype": dtype})
        assert spec.logits_dtype == logits
    with pytest.raises(ValueError, match="router_dtype = 'fp8'; allowed for logits_dtype: fp32, bf16"):
        RouterSpec.from_config({**ring, "router_dtype": "fp8"})
    with pytest.warns(RuntimeWarning, match="moe_router_dtype = bf16 is not followed"):
        RouterSpec.from_config({**V3, "moe_router_dtype": "bf16"})


def test_gemma_has_experts_only_if_it_says_so() -> None:
    gemma = {"model_type": "gemma4_text", "hidden_size": 64, "num_experts": 8, "top_k_experts": 2}
    assert RouterSpec.from_config({**gemma, "enable_moe_block": True}).num_experts == 8
    for stated in ({}, {"enable_moe_block": None}, {"enable_moe_block": False}, {"enable_moe_block": "true"}):
        with pytest.raises(ValueError, match=r"no experts .*enable_moe_block"):
            RouterSpec.from_config({**gemma, **stated})


def test_a_composite_type_around_an_unknown_one() -> None:
    inner = {"model_type": "other", "num_experts": 8}
    with pytest.raises(ValueError, match=r"unknown model_type 'other'; did you mean 'aria_text'"):
        RouterSpec.from_config({"model_type": "aria", "text_config": inner})
    with pytest.raises(ValueError, match="'llama4' is a composite type, and there is no text_config"):
        RouterSpec.from_config({"model_type": "llama4", "num_local_experts": 16})
    small = {"model_type": "smallthinker", "hidden_size": 64, "moe_num_primary_experts": 32}
    with pytest.raises(ValueError, match="unknown model_type 'smallthinker'"):
        RouterSpec.from_config(small)


def test_config_of_one_layer() -> None:
    config = {**QWEN, "per_layer_config": {"1": {"num_experts": 8, "num_experts_per_tok": 2}}}
    assert RouterSpec.from_config(config) == RouterSpec.from_config(config, layer=0) == QWEN_SPEC
    assert RouterSpec.from_config(config, layer=1) == replace(QWEN_SPEC, num_experts=8, top_k=2)


@pytest.mark.parametrize("left_out", ["score_function", "moe_router_enable_expert_bias", None])
def test_ring_under_the_name_of_its_ancestor(left_out: str | None) -> None:
    """Some Ling / Ring 2.0 configs say bailing_moe, the type of Ling-lite, whose router is another."""
    config = {key: value for key, value in RING.items() if key != left_out}
    expected = replace(V3_SPEC, hidden_size=2048, num_experts=256, top_k=8, n_group=8)
    assert RouterSpec.from_config(config) == replace(expected, topk_group=4)
    assert RouterSpec.from_config({**config, "model_type": "bailing_moe_v2"}) == replace(expected, topk_group=4)


def test_ling_lite_stays_what_it_was() -> None:
    lite = {"model_type": "bailing_moe", "hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
    expected = replace(QWEN_SPEC, renormalize=True)
    for extra in ({}, {"score_function": "softmax"}, {"score_function": None, "moe_router_enable_expert_bias": False}):
        assert RouterSpec.from_config({**lite, "norm_topk_prob": True, **extra}) == expected


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
    """Configs of the original code state scoring_func; an engine that reads another from it routes otherwise."""
    deepseek = {"model_type": "deepseek_v3", "n_routed_experts": 256}
    assert RouterSpec.from_config({**deepseek, "scoring_func": "sigmoid"}) == RouterSpec.from_config(deepseek)
    with pytest.raises(ValueError, match="scoring_func = 'softmax'; allowed for scoring_func: sigmoid"):
        RouterSpec.from_config({**deepseek, "scoring_func": "softmax"})
