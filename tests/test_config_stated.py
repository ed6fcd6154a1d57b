"""What a config states: nothing is invented or dropped, at whatever level and under whatever name."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers_routers
from router_cases import Case, tiny_cases
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moegate import RouterSpec
from moegate.catalog import models
from moegate.configs.model_types import (
    model_types,
    refused,
    routing_keys,
    type_of_architecture,
    wrappers,
)
from moegate.warn import warn_once

FIELDS = {field.name for field in dataclasses.fields(RouterSpec)}
KIMI: dict[str, Any] = {
    "model_type": "kimi_linear",
    "hidden_size": 64,
    "num_experts": 32,
    "num_experts_per_token": 4,
}
QWEN: dict[str, Any] = {"model_type": "qwen3_moe", "hidden_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
GPT_OSS: dict[str, Any] = {"model_type": "gpt_oss", "hidden_size": 64, "num_local_experts": 16}


@pytest.fixture(autouse=True)
def _warnings_come_again() -> Iterator[None]:
    warn_once.cache_clear()
    yield
    warn_once.cache_clear()


def quietly(config: object, layer: int | None = None) -> RouterSpec:
    """The spec of a config, which must cause no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return RouterSpec.from_config(config, layer=layer)


# Nothing invented.


def test_no_type_has_a_number_of_experts_by_default() -> None:
    for entry in model_types().values():
        assert "num_experts" not in {**entry.defaults, **entry.spec}, entry.name
        assert entry.keys["num_experts"], entry.name
        counted_by = {key.removesuffix(".0") for key in entry.keys["num_experts"]}
        assert counted_by <= set(routing_keys().states["num_experts"]), entry.name


@pytest.mark.parametrize("name", model_types())
def test_a_type_and_a_size_are_no_router(name: str) -> None:
    """Draft heads and dense models state the type of their family."""
    bare = {"model_type": name, "hidden_size": 7168, "num_hidden_layers": 1}
    nulls = dict.fromkeys(key.partition(".")[0] for key in model_types()[name].keys["num_experts"])
    for config in (bare, {**bare, **nulls}, {"architectures": ["Eagle3DeepseekV2ForCausalLM"], **bare}):
        with pytest.raises(ValueError, match="no experts"):
            RouterSpec.from_config(config)


def test_a_wrapper_is_entered_before_a_table_of_its_own_type() -> None:
    inner = quietly(KIMI)
    assert (inner.hidden_size, inner.num_experts, inner.top_k) == (64, 32, 4)
    for outer in ("kimi_k3", "kimi_linear", "deepseek_v3", "some_composite"):
        stale = {"n_routed_experts": 256, "hidden_size": 7168} if outer == "deepseek_v3" else {}
        assert quietly({"model_type": outer, **stale, "text_config": KIMI}) == inner
    nameless = {key: value for key, value in KIMI.items() if key != "model_type"}
    assert quietly({"model_type": "kimi_linear", "text_config": nameless}) == inner
    # A config with another part's config inside is no wrapper if it has the experts itself.
    assert quietly({**KIMI, "text_config": {"model_type": "llama", "hidden_size": 8}}) == inner


# Nothing dropped.


def test_tables_speak_of_fields_that_a_spec_has() -> None:
    stated = {name for meanings in routing_keys().means.values() for fields in meanings.values() for name in fields}
    assert {*routing_keys().states, *stated} <= FIELDS
    for entry in model_types().values():
        assert set(entry.fields) <= FIELDS, entry.name


def test_every_key_with_which_engines_differ_is_settled() -> None:
    """Each key in `differs` is read by the table, or listed as ignored."""
    followed = {"transformers", "vllm", "sglang", "published", "others"}
    for entry in model_types().values():
        for key, readers in entry.differs.items():
            assert readers["follows"].partition(",")[0] in followed & set(readers), (entry.name, key)
            assert set(readers) <= {*followed, "follows"}, (entry.name, key)
            assert key in entry.read_keys or key in entry.ignores, (entry.name, key)
        for reason in entry.ignores.values():
            assert reason.strip()


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: case.name)
def test_what_transformers_writes_is_read_in_silence(case: Case) -> None:
    config = CONFIG_MAPPING[case.model_type](**case.overrides).to_dict()
    quietly(config, layer=case.layer)


# Settings for config classes of Transformers that leave values open, or are dense by default.
LEFT_OPEN = {
    **dict.fromkeys(("deepseek_ocr2", "deepseek_ocr2_text", "deepseek_v2"), "no num_experts_per_tok"),
    **dict.fromkeys(("diffusion_gemma", "diffusion_gemma_text", "dots1", "nomic_bert"), "its config is not whole"),
    **dict.fromkeys(("gemma4", "gemma4_text"), "enable_moe_block = false"),
    "gemma4_unified_assistant": "has no experts",
    "hunyuan_v1_moe": "num_experts = 1",
}


# One of the classes refuses its own defaults.
SAVED = [name for name in (*model_types(), *wrappers()) if name in CONFIG_MAPPING and name != "gemma4_assistant"]


@pytest.mark.parametrize("name", SAVED)
def test_configs_that_transformers_saves_anew(name: str) -> None:
    """Saved configs have the class's names of the keys, and all of the class's defaults."""
    config = CONFIG_MAPPING[name]()
    if name in LEFT_OPEN:
        with pytest.raises(ValueError, match=LEFT_OPEN[name]):
            RouterSpec.from_config(config)
    else:
        assert quietly(config).num_experts > 1


@pytest.mark.parametrize("name", transformers_routers.model_types())
def test_what_the_catalog_says_is_read_in_silence(name: str) -> None:
    for model in models():
        if model.model_type == name:
            quietly(model.config)


@pytest.mark.parametrize(
    ("config", "key", "spec_has"),
    [
        ({**GPT_OSS, "n_group": 4}, "n_group = 4", "n_group = 1"),
        ({**GPT_OSS, "routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5", "routed_scaling_factor = 1.0"),
        ({**GPT_OSS, "scoring_func": "sigmoid"}, "scoring_func = sigmoid", "scoring_func = 'softmax'"),
        ({**GPT_OSS, "norm_topk_prob": False}, "norm_topk_prob = false", "renormalize = True"),
        ({**GPT_OSS, "topk_method": "noaux_tc"}, "topk_method = noaux_tc", "correction_bias = False"),
        ({**GPT_OSS, "moe_router_logit_softcapping": 30.0}, "moe_router_logit_softcapping = 30.0", "logit_softcapping"),
        ({**GPT_OSS, "num_experts": 32}, "num_experts = 32", "num_experts = 16"),
        ({**GPT_OSS, "zero_expert_num": 2}, "zero_expert_num = 2", "num_zero_experts = 0"),
    ],
)
def test_a_key_that_states_another_router_is_warned_of_once(config: dict[str, Any], key: str, spec_has: str) -> None:
    with pytest.warns(RuntimeWarning) as caught:
        RouterSpec.from_config(config)
    (warning,) = caught
    assert f"config of model_type 'gpt_oss': {key} is not followed" in str(warning.message)
    assert spec_has in str(warning.message)
    quietly(config)  # a second time: no further warning


def test_keys_that_state_what_the_router_does_anyway() -> None:
    """gpt-oss's softmax over the selected logits sums to 1: in configs, a softmax with normed weights."""
    stale = {"n_group": 1, "topk_group": 4, "routed_scaling_factor": 1, "norm_topk_prob": True}
    more = {"scoring_func": "softmax", "topk_method": "greedy", "use_routing_bias": False, "num_experts": 16}
    assert quietly({**GPT_OSS, **stale, **more, "moe_router_logit_softcapping": 0.0}) == quietly(GPT_OSS)


# The places that state a type.


@pytest.mark.parametrize("name", wrappers())
def test_a_wrapper_gives_its_type_to_a_config_without_one(name: str) -> None:
    """Hub files may lack the inner type, which the wrapper's class implies in Transformers."""
    for key, inner in wrappers()[name].items():
        if inner not in model_types():  # a wrapper inside a wrapper
            assert inner in wrappers(), (name, inner)
            continue
        config = filled(inner)
        expected = quietly({"model_type": inner, **config})
        assert quietly({"model_type": name, key: config}) == expected
        assert quietly({"model_type": name, key: {"model_type": inner, **config}}) == expected


def filled(name: str) -> dict[str, Any]:
    """A config of a type, with all sizes and without model_type."""
    entry = model_types()[name]
    sizes = {"hidden_size": 64, "num_experts": 16, "top_k": 4, "n_group": 1, "topk_group": 1, "input_norm_eps": 1e-6}
    asked = [(entry.keys_of(field), size) for field, size in sizes.items()]
    config: dict[str, Any] = {}
    for keys, size in asked:
        if keys:
            *tables, last = keys[-1].split(".") if "." in keys[0] and keys[0].endswith(".0") else keys[0].split(".")
            inner = config
            for table in tables:
                inner = inner.setdefault(table, {})
            inner[last] = size
    for field, keys in entry.keys.items():
        if field not in sizes and field not in entry.defaults and field not in entry.spec and keys:
            config[keys[0]] = {"renormalize": True, "routed_scaling_factor": 1.0}.get(field, 1)
    return config | {rule["key"]: rule["unless"] for rule in entry.dense if "unless" in rule}


@pytest.mark.parametrize("name", [name for name in transformers_routers.model_types() if name in CONFIG_MAPPING])
def test_architectures_stand_in_for_a_missing_type(name: str) -> None:
    camel = "".join(part.capitalize() for part in name.removesuffix("_text").split("_"))
    resolved = type_of_architecture(f"{camel}ForCausalLM")
    assert resolved is not None
    if resolved == name:
        config = filled(name)
        assert quietly({"architectures": [f"{camel}ForCausalLM"], **config}) == quietly({"model_type": name, **config})


def test_an_unknown_type_with_a_known_class() -> None:
    ling = {**filled("bailing_moe_v2"), "architectures": ["BailingMoeV2ForCausalLM"]}
    assert quietly(ling) == quietly({"model_type": "bailing_moe_v2", **filled("bailing_moe_v2")})
    assert quietly({**QWEN, "model_type": "my_qwen", "architectures": ["Qwen3MoeForCausalLM"]}) == quietly(QWEN)
    assert quietly({**QWEN, "architectures": ["SomethingElse", 3]}) == quietly(QWEN)


# Configs without a router: the error is one line.


@pytest.mark.parametrize("name", refused())
def test_out_of_scope(name: str) -> None:
    for config in (
        {"model_type": name, "num_experts": 16},
        {"model_type": "wrap", "text_config": {"model_type": name}},
    ):
        with pytest.raises(ValueError, match="is refused: ") as caught:
            RouterSpec.from_config(config)
        assert refused()[name] in str(caught.value)
        assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "hidden_size": 4096},
        {"model_type": "llava", "text_config": {"model_type": "qwen3", "hidden_size": 64}},
        {"model_type": "granitemoehybrid", "hidden_size": 64, "num_local_experts": 0},
        {"model_type": "gemma4", "text_config": {"model_type": "gemma4_text", "num_experts": None}},
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 64},
    ],
)
def test_a_model_without_experts(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for form in (config, tmp_path):
        with pytest.raises(ValueError, match="no experts") as caught:
            RouterSpec.from_config(form)
        assert len(str(caught.value)) < 250
