"""Composite types lead to their language model, and class names to their type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_configs import counting_experts
from transformers.models.auto import modeling_auto

from moegate import Gate, RouterSpec
from moegate.configs.model_types import model_types, refused, type_of_architecture, wrappers
from moegate.configs.routing_part import routing_config

LEADING = [
    (name, key, inner) for name, keys in wrappers().items() for key, inner in keys.items() if inner in model_types()
]


@pytest.mark.parametrize(("wrapper", "key", "inner"), LEADING)
def test_the_type_of_the_config_inside(wrapper: str, key: str, inner: str) -> None:
    """An inner config without a type has the wrapper's type; otherwise its own type counts."""
    text = counting_experts(inner, 16)
    assert routing_config({"model_type": wrapper, key: text})[1].name == inner
    stated = {"model_type": "mixtral", "num_local_experts": 16}
    assert routing_config({"model_type": wrapper, key: stated})[1].name == "mixtral"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "kimi_k25", "text_config": {"n_routed_experts": 384}}, "deepseek_v3"),
        ({"model_type": "kimi_vl", "text_config": {"n_routed_experts": 64}}, "deepseek_v3"),
        ({"model_type": "deepseek_vl_v2", "language_config": {"n_routed_experts": 72}}, "deepseek_v2"),
        ({"model_type": "unlimited-ocr", "language_config": {"n_routed_experts": 64}}, "unlimited_ocr_text"),
        ({"model_type": "interns1_pro", "text_config": {"num_experts": 512}}, "interns1_pro_text"),
        ({"model_type": "step3_vl", "text_config": {"moe_num_experts": 48}}, "step3_text"),
        ({"model_type": "moondream3", "config": {"text": {"moe": {"n_experts": 64}}}}, "moondream3_text"),
        ({"model_type": "NemotronH_Nano_VL_V2", "llm_config": {"n_routed_experts": 128}}, "nemotron_h"),
        # The language model is given by its class (SGLang 0.5.23 configs/internvl.py: InternVLChatConfig).
        (
            {
                "model_type": "internvl_chat",
                "llm_config": {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128},
            },
            "qwen3_moe",
        ),
        ({"model_type": "internvl_chat", "llm_config": {"model_type": "gpt_oss", "num_experts": 32}}, "gpt_oss"),
        ({"architectures": ["KimiK25ForConditionalGeneration"], "text_config": {"n_routed_experts": 8}}, "deepseek_v3"),
        ({"architectures": ["Qwen3_5MoeForCausalLM"], "num_experts": 256}, "qwen3_5_moe_text"),
        ({"architectures": ["Qwen4ExpForCausalLM"], "text_config": {"num_experts": 512}}, "qwen4_exp_text"),
    ],
)
def test_composite_models(config: dict[str, Any], expected: str) -> None:
    assert routing_config(config)[1].name == expected


def test_a_gate_of_a_composite_model(tmp_path: Path) -> None:
    """The language models of MiniMax-M3 and Kimi-K2.5 state no type."""
    text = {"hidden_size": 64, "n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "kimi_k25", "text_config": text}), encoding="utf-8")
    gate = {"weight": torch.randn(16, 64), "e_score_correction_bias": torch.randn(16)}
    stored = {f"language_model.model.layers.3.mlp.gate.{name}": tensor for name, tensor in gate.items()}
    save_file(stored, tmp_path / "model.safetensors")
    read = Gate.from_checkpoint(tmp_path, 3)
    assert read.spec == RouterSpec.from_config({"model_type": "deepseek_v3", **text})
    assert torch.equal(read.weight, gate["weight"])


# Class names with softmax routers in the registries of vLLM 0.33.0 (models/registry.py) and SGLang 0.5.23
# (EntryClass of models/*.py) and in published configs, with the model type of each.
ARCHITECTURES = {
    "AriaForConditionalGeneration": "aria",
    "BailingMoEForCausalLM": "bailing_moe",
    "BailingMoeForCausalLM": "bailing_moe",
    "BailingMoeV2ForCausalLM": "bailing_moe_v2",
    "Cohere2MoeForCausalLM": "cohere2_moe",
    "DbrxForCausalLM": "dbrx",
    "DeepseekForCausalLM": "deepseek",
    "DeepseekOCR2ForCausalLM": "deepseek_ocr2_text",
    "DeepseekOCRForCausalLM": "deepseek-ocr",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekVL2ForCausalLM": "deepseek_vl2",
    "DeepseekVLV2ForCausalLM": "deepseek_vl_v2",
    "DiffusionGemmaForBlockDiffusion": "diffusion_gemma",
    "Ernie4_5_MoeForCausalLM": "ernie4_5_moe",
    "Ernie4_5_VLMoeForConditionalGeneration": "ernie4_5_vl_moe",
    "FlexOlmoForCausalLM": "flex_olmo",
    "Gemma4ForCausalLM": "gemma4_text",
    "Gemma4ForConditionalGeneration": "gemma4",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteMoeForCausalLM": "granitemoe",
    "GraniteMoeHybridForCausalLM": "granitemoehybrid",
    "GraniteMoeSWAForCausalLM": "granitemoe_swa",
    "GraniteMoeSharedForCausalLM": "granitemoeshared",
    "Grok1ForCausalLM": "grok-1",
    "Grok1ModelForCausalLM": "grok-1",
    "GroveMoeForCausalLM": "grove_moe",
    "HunYuanForCausalLM": "hunyuan",
    "HunYuanMoEV1ForCausalLM": "hunyuan_v1_moe",
    "HunyuanImage3ForCausalMM": "hunyuan_image_3_moe",
    "InternS1ForConditionalGeneration": "interns1",
    "InternS1ProForConditionalGeneration": "interns1_pro",
    "InternS2MobiusForConditionalGeneration": "interns2_mobius",
    "InternS2PreviewForConditionalGeneration": "intern_s2_preview",
    "JambaForCausalLM": "jamba",
    "JambaForSequenceClassification": "jamba",
    "LLaDAMoEModelLM": "lladamoe",
    "Llama4ForCausalLM": "llama4_text",
    "Llama4ForConditionalGeneration": "llama4",
    "LongcatFlashForCausalLM": "longcat_flash",
    "LongcatFlashNgramForCausalLM": "longcat_flash_ngram",
    "MellumForCausalLM": "mellum",
    "MiniCPMForCausalLM": "minicpm",
    "MixtralForCausalLM": "mixtral",
    "Moondream3ForCausalLM": "moondream3_text",
    "NomicBertModel": "nomic_bert",
    "OlmoeForCausalLM": "olmoe",
    "OpenAIPrivacyFilterForTokenClassification": "openai_privacy_filter",
    "Ovis2_6_MoeForCausalLM": "ovis2_6_moe",
    "PanguProMoEForCausalLM": "PanguProMoE",
    "PanguProMoEV2ForCausalLM": "pangu_pro_moe_v2",
    "PhiMoEForCausalLM": "phimoe",
    "QuantMixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3OmniMoeForConditionalGeneration": "qwen3_omni_moe",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5MoeForCausalLM": "qwen3_5_moe_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
    "Qwen4ExpForCausalLM": "qwen4_exp_text",
    "Qwen4ExpForConditionalGeneration": "qwen4_exp",
    "SDARMoeForCausalLM": "sdar_moe",
    "Step3TextForCausalLM": "step3_text",
    "Step3VLForConditionalGeneration": "step3_vl",
    "UnlimitedOCRForCausalLM": "unlimited_ocr_text",
    "XllmForCausalLM": "xllm",
    "XverseMoeForCausalLM": "xverse_moe",
    "ZayaForCausalLM": "zaya",
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_class_names_of_the_engines(architecture: str) -> None:
    expected = ARCHITECTURES[architecture]
    assert type_of_architecture(architecture) == expected
    assert expected in {**model_types(), **wrappers(), **refused()}


# Classes named unlike their composite type. A config of such a class without model_type is refused, not misread.
NAMED_OTHERWISE = {
    "MiniMaxM3SparseForConditionalGeneration",
    "Nemotron3_5TranscribeForConditionalGeneration",
}


# Types that Transformers loads with the class of another type.
LOADED_AS_ANOTHER = {"sarvam_moe", "sarvam_mla"}


def test_class_names_of_transformers() -> None:
    """The class that Transformers makes for a known type means this type, its inner type, or its other name."""
    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    )
    pairs = {(name, architecture) for table in tables for name, architecture in table.items()}
    known = {*model_types(), *wrappers()} - LOADED_AS_ANOTHER
    ours = {(name, architecture) for name, architecture in pairs if name in known}
    assert len(ours) > 80
    for name, architecture in ours:
        found = type_of_architecture(architecture)
        if architecture in NAMED_OTHERWISE or architecture == "JevForDecision":  # a head over any model
            assert found is None
        else:
            assert found is not None
            assert found == name or _routers(found) == _routers(name), architecture


def _routers(name: str) -> set[str]:
    return set(wrappers()[name].values()) if name in wrappers() else {name}
