"""The catalog's rows: each builds a spec, has a source and a unique name; some specs are written out here."""

from __future__ import annotations

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import moegate
from moegate import RouterSpec
from moegate.catalog import Model, get_model, models, names
from moegate.configs.model_types import ModelType, model_types

# Written out in full, independently of the tables of model types.
WRITTEN_OUT = {
    "deepseek-v2": RouterSpec(
        5120, 160, 6, "softmax", n_group=8, topk_group=3, group_score="max", routed_scaling_factor=16.0
    ),
    "deepseek-v3": RouterSpec(
        7168,
        256,
        8,
        "sigmoid",
        "score",
        n_group=8,
        topk_group=4,
        renormalize=True,
        renormalize_eps=1e-20,
        routed_scaling_factor=2.5,
    ),
    "kimi-k2": RouterSpec(
        7168, 384, 8, "sigmoid", "score", renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=2.827
    ),
    "gpt-oss-120b": RouterSpec(
        2880,
        128,
        4,
        "identity",
        weights_from="softmax_of_selected",
        logits_dtype="bfloat16",
        linear_bias=True,
    ),
    "llama-4-maverick": RouterSpec(
        5120, 128, 1, "identity", weights_from="sigmoid_of_selected", logits_dtype="bfloat16"
    ),
    "longcat-flash": RouterSpec(
        6144,
        512,
        12,
        "softmax",
        "score",
        routed_scaling_factor=6.0,
        weight_dtype="float32",
        num_zero_experts=256,
    ),
    "mixtral-8x7b": RouterSpec(4096, 8, 2, "softmax", renormalize=True, logits_dtype="bfloat16"),
    "qwen3-235b-a22b": RouterSpec(4096, 128, 8, "softmax", renormalize=True, logits_dtype="bfloat16"),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_written_out(name: str) -> None:
    assert moegate.get_spec(name) == WRITTEN_OUT[name]


@pytest.mark.parametrize("model", models(), ids=lambda model: model.name)
def test_row(model: Model) -> None:
    assert model.source.strip()
    assert model.semantics_source.strip()
    assert model.note is None or model.note.strip()
    assert model.spec == moegate.get_spec(model.name) == RouterSpec.from_config(model.config)
    assert all(get_model(name) is model for name in (model.name, *model.also))


def test_names_are_unique_and_lower_case() -> None:
    every = [name for model in models() for name in (model.name, *model.also)]
    assert names() == sorted(every)
    assert len(set(every)) == len(every)
    assert all(name == name.lower().strip() and " " not in name for name in every)


def test_no_key_of_a_row_is_ignored() -> None:
    """A misspelt key would leave its field to a default."""
    for model in models():
        entry = model_types()[model.model_type]
        read = {"model_type", "dtype", "hidden_size", *entry.read_keys}
        assert not {key for key in _flat(model.config) if key not in read}, model.name


def _flat(config: dict[str, object], prefix: str = "") -> list[str]:
    flat = []
    for key, value in config.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [prefix + key]
    return flat


@pytest.mark.parametrize("model", [m for m in models() if m.source.endswith(" defaults")], ids=lambda m: m.name)
def test_rows_taken_from_the_defaults_of_a_config_class(model: Model) -> None:
    config = CONFIG_MAPPING[model.model_type]()
    config.dtype = torch.bfloat16
    layer = 0 if model.spec.hash_routing else None  # DeepSeek-V4's first layers
    assert RouterSpec.from_config(config, layer=layer) == model.spec


@pytest.mark.parametrize("entry", model_types().values(), ids=lambda entry: entry.name)
def test_model_type_names_the_tensors_of_its_spec(entry: ModelType) -> None:
    assert entry.source.strip()
    assert "weight" in entry.tensors

    def may_be(name: str) -> list[object]:
        return list(entry.choices.get(name, {}).values())

    roles = {
        "e_score_correction_bias": entry.spec.get("correction_bias") or "score" in may_be("correction_bias"),
        "bias": entry.spec.get("linear_bias") or True in may_be("linear_bias"),
        "per_expert_scale": entry.spec.get("per_expert_scale"),
        "global_scale": entry.spec.get("global_scale"),
        "input_scale": "input_norm_eps" in entry.keys,
        "tid2eid": entry.hash_routing_layers,
    }
    assert {role for role, needed in roles.items() if needed} | {"weight"} == set(entry.tensors)


def test_a_hub_id_names_its_model() -> None:
    assert moegate.get_spec("Qwen/Qwen3-30B-A3B") == moegate.get_spec("qwen3-30b-a3b")
    with pytest.raises(TypeError, match="name: got NoneType; allowed: a str"):
        moegate.get_spec(None)  # type: ignore[arg-type]


def test_unknown_name_suggests_close_ones() -> None:
    with pytest.raises(ValueError, match=r"'deepseek-v33'; did you mean .*'deepseek-v3'.*moegate\.catalog\.names"):
        get_model("deepseek-v33")
    assert get_model("DeepSeek-V3") is get_model("deepseek-r1")


def test_each_model_whose_reference_casts_its_weights_says_so() -> None:
    for model in models():
        casts = model_types()[model.model_type].casts_weights
        assert casts == ("casts its weights to the model's dtype" in (model.semantics_note or "")), model.name
    note = next(model for model in models() if model.name == "gpt-oss-120b").semantics_note
    assert note == (
        "the reference takes the softmax in the model's dtype; the reference casts its weights to the model's dtype"
    )


def test_only_a_class_of_transformers_casts() -> None:
    assert all(entry.router for entry in model_types().values() if entry.casts_weights)
