"""What moegate would take over of a checkpoint in each engine, before the engine loads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from moegate.catalog.checkpoint import Checkpoint
from moegate.integrations.engines import TRANSFORMERS, Engine
from moegate.integrations.takeover import Takeover
from moegate.spec import RouterSpec

# What a router of vLLM or SGLang can be told; the other fields of a spec are functions of the model's own there.
_TOLD = frozenset(
    {
        *("hidden_size", "num_experts", "top_k", "scoring_func", "correction_bias", "n_group", "topk_group"),
        *("group_score", "renormalize", "renormalize_eps", "routed_scaling_factor", "linear_bias"),
        *("logits_dtype", "weight_dtype", "topk_ids_dtype", "topk_weights_dtype"),
    }
)


def forecast(engine: Engine, folder: Path) -> Takeover:
    """The MoE layers of a checkpoint by whether moegate would route them, as far as its files tell.

    Args:
        engine: One of `ENGINES`. Transformers has to be installed, since its own classes are asked.
        folder: A folder with `config.json` and, for an engine other than Transformers, safetensors files.

    Raises:
        ValueError: No such folder, or a config or files that tell no router.
    """
    if engine is TRANSFORMERS:
        return _of_model_on_meta(folder)
    takeover = Takeover()
    for layer in Checkpoint(folder).layers:
        reason = _why_left(RouterSpec.from_config(folder, layer=layer))
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
        model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    return patch(model)


def _why_left(spec: RouterSpec) -> str | None:
    """Why vLLM and SGLang go on to compute this router; None: moegate would."""
    if spec.correction_bias == "logit":
        return "a correction bias on the logits"
    if spec.weights_from == "softmax_of_selected" and spec.scoring_func in ("softmax", "identity"):
        spec = dataclasses.replace(spec, weights_from="score", scoring_func="softmax")  # with renormalize: the same
    for field in dataclasses.fields(spec):
        if field.name not in _TOLD and getattr(spec, field.name) != field.default:
            return field.name.replace("_", " ")
    return None
