"""Checkpoints of a few small tensors, written by hand, which no tiny model of Transformers would save."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moegate import Gate

EXPERTS, HIDDEN, TOP_K = 16, 64, 4
GATE = "model.layers.1.mlp.gate."

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": EXPERTS, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": EXPERTS},
    "deepseek_v3": {"n_routed_experts": EXPERTS, "n_group": 4, "topk_group": 2},
    "ernie4_5_moe": {"moe_num_experts": EXPERTS, "moe_k": TOP_K},
    "deepseek_v4": {"n_routed_experts": EXPERTS, "num_hash_layers": 3},
}


def config_of(model_type: str, **more: Any) -> dict[str, Any]:
    """A config.json of a router with 16 experts and hidden size 64; None leaves a key out."""
    shared = {"hidden_size": HIDDEN, "num_experts_per_tok": TOP_K, "torch_dtype": "bfloat16"}
    config = {"model_type": model_type, **shared, **CONFIGS[model_type], **more}
    return {key: value for key, value in config.items() if value is not None}


def write(folder: Path, tensors: dict[str, Tensor], model_type: str = "qwen3_moe", **config: Any) -> Path:
    """Writes a checkpoint of one file; returns the folder."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(model_type, **config)), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    """Writes the index of a sharded checkpoint."""
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def weight(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A gate's weight."""
    return torch.randn(EXPERTS, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def bias(seed: int = 0) -> Tensor:
    """A gate's bias."""
    return torch.randn(EXPERTS, generator=torch.Generator().manual_seed(100 + seed))


def refused(path: Any, *words: str, error: type[Exception] = ValueError, layer: Any = 1, **options: Any) -> str:
    """Asserts that a gate is refused with a message that has all these words; returns the message."""
    with pytest.raises(error, match=re.escape(words[0])) as caught:
        Gate.from_checkpoint(path, layer, **options)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)
