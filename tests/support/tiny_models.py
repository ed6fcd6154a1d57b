"""Tiny models of Transformers' MoE families, for tests with a whole checkpoint.

`tiny_model("deepseek_v3")` gives a model with two layers, a hidden size of 64 and 16 experts, on the CPU, in
a fraction of a second. Every tensor of a router holds random values, also those that Transformers initialises
to zeros or ones (biases, scales, hash tables): a test on zeros would not notice a tensor that is never read.
"""

import importlib
import re
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

EXPERTS = 16
TOP_K = 4

# Sizes that make any family small. A config class gets those that it has.
SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 16,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_routed_experts": EXPERTS,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_experts_per_token": TOP_K,
    "moe_topk": TOP_K,
    "moe_k": TOP_K,
    "top_k_experts": TOP_K,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
}

GROUPS = {"n_group": 4, "topk_group": 2}
MOE_LAYERS = {"mlp_layer_types": ["sparse", "sparse"]}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}

# What a family needs beyond SMALL. Settings with a branch in the router are set so that the branch runs (groups, a
# soft cap, a scaling factor), also where the family's default would switch them off.
TINY: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 1, "route_scale": 2.0},
    "aria_text": {},
    "axk1": GROUPS,
    "axk2": {"n_group": None, "topk_group": None},
    "bailing_hybrid": MOE_LAYERS | {"num_expert_group": 4, "topk_group": 2, "use_cache": False},
    "beam": GROUPS | MOE_LAYERS,
    "cohere2_moe": {"expert_selection_fn": "sigmoid"},
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 128,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 32,
            "moe_num_experts": EXPERTS,
            "moe_top_k": TOP_K,
        },
    },
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": GROUPS | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    "deepseek_v3": GROUPS | {"first_k_dense_replace": 1},
    "deepseek_v32": GROUPS | MOE_LAYERS,
    "deepseek_v4": {
        "mlp_layer_types": ["hash_moe", "moe"],
        "layer_types": ["sliding_attention", "sliding_attention"],
        "o_groups": 2,
        "o_lora_rank": 16,
    },
    "dots1": {"n_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "ernie4_5_vl_moe_text": {
        "moe_intermediate_size": [32, 16],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
    },
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {"mlp_only_layers": []},
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 16,
        "global_head_dim": 16,
    },
    "glm4_moe": {"routed_scaling_factor": 2.5},
    "glm4_moe_lite": {},
    "glm4v_moe_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    },
    "glm5_next_text": MOE_LAYERS | {"qk_rope_head_dim": 0, "use_cache": False},
    "glm_moe_dsa": {"first_k_dense_replace": 1},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"]},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "inkling2_text": {"unpadded_vocab_size": 128},
    "inkling_text": {},
    "jamba": {"use_cache": False},
    "jetmoe": {},
    "kimi_linear": {"use_cache": False},
    "kolibri1": {"norm_topk_prob": True},
    "laguna": {"moe_router_logit_softcapping": 4.0, "moe_routed_scaling_factor": 2.5},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    "longcat_flash": {
        "num_layers": 1,
        "ffn_hidden_size": 64,
        "expert_ffn_hidden_size": 32,
        "zero_expert_num": 8,
    },
    "mellum": {},
    "mimo_v2_flash": {"num_key_value_heads": 2},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "mistral4": {},
    "mistral_large4_text": MOE_LAYERS,
    "mixtral": {},
    "muse_spark_text": {"moe_hidden_size": 32},
    "nemotron_h": {},
    "olmoe": {},
    "openai_privacy_filter": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": LINEAR_ATTENTION,
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_next": LINEAR_ATTENTION,
    "qwen3_omni_moe_text": {},
    "qwen3_vl_moe_text": {},
    "solar_open": {},
    "step3p5": MOE_LAYERS | {"moe_router_scaling_factor": 3.0},
    "unlimited_ocr_text": MOE_LAYERS,
}

# Text models that no auto class finds by config.
CLASSES: dict[str, str] = {
    "deepseek_ocr2_text": "DeepseekOcr2TextModel",
    "ernie4_5_vl_moe_text": "Ernie4_5_VLMoeTextModel",
    "qwen3_omni_moe_text": "Qwen3OmniMoeThinkerTextModel",
    "step3p5": "Step3p7TextModel",
    "unlimited_ocr_text": "UnlimitedOcrTextModel",
}


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The config of the tiny model; `overrides` are keys of the family's own config."""
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**(small_sizes(config_class) | TINY[model_type] | overrides))


def small_sizes(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The small sizes that a config class has."""
    known = getattr(config_class, "__dataclass_fields__", {})
    return {key: value for key, value in SMALL.items() if key in known}


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    """A tiny model in eval mode; equal arguments give equal models."""
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _model_class(model_type, config)(config).eval()
        _randomise_routers(model)
    _cast(model, dtype)
    return model


def _model_class(model_type: str, config: PreTrainedConfig) -> type[PreTrainedModel]:
    if model_type in CLASSES:
        package = type(config).__module__.replace("configuration_", "modeling_")
        text_class: type[PreTrainedModel] = getattr(importlib.import_module(package), CLASSES[model_type])
        return text_class
    auto = MODEL_FOR_CAUSAL_LM_MAPPING if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else MODEL_MAPPING
    model_class: type[PreTrainedModel] = auto[type(config)]
    return model_class


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts as from_pretrained does: tensors that the family keeps in float32 stay in float32."""
    pinned = model._keep_in_fp32_modules_strict or ()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in name for part in pinned):
            tensor.data = tensor.data.to(dtype)
    model.config.dtype = dtype


def _randomise_routers(model: PreTrainedModel) -> None:
    is_router = re.compile(r"(Router|TopKGating|MoEV1Gate)$")
    for module in model.modules():
        if is_router.search(type(module).__name__):
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                _randomise(name, tensor, module)
    # Some families keep the bias on the block around the router.
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if re.search(r"(e_score_correction_bias|expert_bias)$", name):
            tensor.data.normal_(std=0.1)


def _randomise(name: str, tensor: torch.Tensor, module: torch.nn.Module) -> None:
    if name.endswith("tid2eid"):
        # k different experts per token id, as a real table has.
        num_experts = module.get_parameter("weight").shape[0]
        order = torch.rand(tensor.shape[0], num_experts).argsort(dim=-1)
        tensor.data.copy_(order[:, : tensor.shape[1]])
    elif name.endswith("scale"):
        tensor.data.normal_(mean=1.0, std=0.2)
    elif tensor.dim() == 2 and tensor.shape[0] > 1:
        tensor.data.normal_(std=1.5 * tensor.shape[1] ** -0.5)  # logits of standard deviation 1.5
    else:
        tensor.data.normal_(std=0.1)
