"""What moegate would take over of a checkpoint in each engine, before the engine loads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moegate.catalog.checkpoint import Checkpoint
from moegate.configs.routing_part import routing_config
from moegate.integrations.engines import TRANSFORMERS, Engine
from moegate.integrations.takeover import Takeover
from moegate.spec import RouterSpec

# What no router of vLLM or SGLang can be told. There, functions of the model's own compute these fields of a spec.
_OWN = {
    "select_per_group": "a choice within each group",
    "group_score_top_j": "groups ranked by a sum of several scores",
    "weights_from": "a routing function of the model's own",
    "renormalize_floor": "a least sum of the weights",
    "logit_multiplier": "a multiplier of the logits",
    "logit_softcapping": "a soft cap of the logits",
    "per_expert_scale": "a scale by expert",
    "num_zero_experts": "zero experts",
    "num_shared_gates": "shared gates",
    "global_scale": "a global scale",
    "hash_routing": "hash routing",
    "input_norm_eps": "an input norm",
}


def forecast(engine: Engine, folder: Path) -> Takeover:
    """The MoE layers of a checkpoint by whether moegate would route them, as far as its files tell.

    Args:
        engine: One of `ENGINES`. Transformers has to be installed, since its own classes are asked.
        folder: A folder with `config.json` and, for an engine other than Transformers, safetensors files.

    Raises:
        ValueError: No such folder, or a config or files that tell no router.
    """
    if not folder.is_dir():
        raise ValueError(f"checkpoint: no folder {folder}")
    if engine is TRANSFORMERS:
        return _of_model_on_meta(folder)
    takeover = Takeover()
    is_float16 = routing_config(folder)[0].get("dtype") == "float16"
    for layer in Checkpoint(folder).layers:
        reason = "float16 logits" if is_float16 else _why_left(RouterSpec.from_config(folder, layer=layer))
        if reason is None:
            takeover.taken.append(f"layer {layer}")
        else:
            takeover.left[f"layer {layer}"] = reason
    return takeover


def _of_model_on_meta(folder: Path) -> Takeover:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moegate.integrations.transformers import patch

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    return patch(model)


def _why_left(spec: RouterSpec) -> str | None:
    """Why vLLM and SGLang go on to compute this router; None: moegate would."""
    if spec.correction_bias == "logit":
        return "a correction bias on the logits"
    if spec.weights_from == "softmax_of_selected" and spec.scoring_func in ("softmax", "identity"):
        spec = dataclasses.replace(spec, weights_from="score", scoring_func="softmax")  # with renormalize: the same
    defaults = {field.name: field.default for field in dataclasses.fields(spec)}
    return next((reason for name, reason in _OWN.items() if getattr(spec, name) != defaults[name]), None)
