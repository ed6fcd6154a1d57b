"""The routers that are compared with Transformers, and their dtypes.

`python tests/support/router_cases.py > docs/checked_rows.md` writes the list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import tiny_models
import transformers_routers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moegate.catalog import Model, models
from moegate.configs.model_types import model_types


class Rounding(NamedTuple):
    """The roundings to bfloat16 that a class makes in a bfloat16 model, and a RouterSpec cannot express."""

    of_weights: int
    """roundings of a weight, including those of the renormalising sum"""
    of_score: float
    """roundings of the score in the choice key"""
    of_input: int
    """roundings of the gate's input"""
    where: str


# These classes are compared exactly in float32, and within these roundings in bfloat16. Dividing by a sum adds the
# roundings of the scores and one of the sum; a root halves a relative error.
ROUNDINGS = {
    "cohere2_moe": Rounding(4, 0, 0, "the sigmoid, the sum and the quotient"),
    "dbrx": Rounding(4, 1, 0, "the softmax, the norm and the quotient"),
    "deepseek_v4": Rounding(6, 1.5, 0, "the logits, the softplus, the root, the sum, the quotient and the product"),
    "diffusion_gemma_text": Rounding(0, 0, 3, "the norm and both scalings of the input"),
    "gemma4_text": Rounding(0, 0, 3, "the norm and both scalings of the input"),
    "lfm2_moe": Rounding(6, 1, 0, "the sigmoid, the sum, the epsilon, the quotient and the product"),
    "mistral4": Rounding(5, 1, 0, "the softmax, the sum, the quotient and the product"),
}

# Transformers loads a config of the first type as one of the second type.
LOADED_AS = {"kimi_k2": "deepseek_v3"}

# Config keys that a class needs beyond the part of the config in the catalog.
_DBRX_SIZE = 6144
NEEDED: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0},
        "ffn_config": {
            "hidden_size": _DBRX_SIZE,
            "moe_num_experts": 16,
            "moe_top_k": 4,
            "moe_normalize_expert_weights": 1.0,
        },
    },
}
HASH_LAYER: dict[str, Any] = {"num_hidden_layers": 1, "layer_types": ["sliding_attention"], "vocab_size": 512}

# Tiny sizes for types without a model in tiny_models.
_NO_TINY_MODEL: dict[str, dict[str, Any]] = {
    "diffusion_gemma_text": {},
    "dots3_note_text": {},
    "hy_v4_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "inkling2_loop_text": {},
    "lara_mini": {},
    "dots3_note_vision_encoder": {"pyramid_num_routed": [-1, 16], "adapter_in_dim": 64},
    "qwen3_omni_moe_talker_text": {"norm_topk_prob": True},
    "qwen4_exp_text": {},
}

# Settings for branches of a class that its tiny model does not run.
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("axk2", "groups", tiny_models.GROUPS),
    ("cohere2_moe", "softmax", {"expert_selection_fn": "softmax"}),
    ("deepseek_v2", "greedy", {"topk_method": "greedy"}),
    ("deepseek_v3", "not normed", {"norm_topk_prob": False}),
    ("flint", "not normed", {"norm_topk_prob": False}),
    ("laguna", "no cap", {"moe_router_logit_softcapping": 0.0}),
    ("lfm2_moe", "no bias", {"use_expert_bias": False}),
    ("lfm2_moe", "not normed", {"norm_topk_prob": False}),
    ("llama4_text", "top 2", {"num_experts_per_tok": 2}),
    ("longcat_flash", "no zero experts", {"zero_expert_num": 0}),
    ("mistral4", "groups", tiny_models.GROUPS),
    ("mistral_large4_text", "groups", tiny_models.GROUPS),
    ("qwen3_moe", "not normed", {"norm_topk_prob": False}),
]


@dataclass(frozen=True)
class Case:
    """A router to compare."""

    name: str
    model_type: str
    overrides: dict[str, Any]
    dtype: str
    tokens: int
    hash_routing: bool = False
    layer: int | None = None

    @property
    def rounded(self) -> Rounding | None:
        """The roundings of the class beyond its spec."""
        return ROUNDINGS.get(self.model_type) if self.dtype == "bfloat16" else None

    @property
    def rounds_weights(self) -> bool:
        """True if the class finally casts its weights to the model's dtype, as topk_weights_dtype = "bfloat16" says."""
        return self.dtype == "bfloat16" and model_types()[self.model_type].casts_weights


def exact_dtype(model_type: str) -> str:
    """The model's dtype in which a class computes exactly what its spec says."""
    return "float32" if model_type in ROUNDINGS else "bfloat16"


def transformers_type(model: Model) -> str | None:
    """The model type with a router class in Transformers for a row of the catalog; None: there is no class."""
    name = LOADED_AS.get(model.model_type, model.model_type)
    return name if name in transformers_routers.model_types() else None


def row_overrides(model: Model) -> dict[str, Any]:
    """The row's config as keyword arguments of the config class."""
    config = {key: value for key, value in model.config.items() if key not in ("model_type", "dtype")}
    if "mlp_layer_types" in config:
        config.update(HASH_LAYER)
    return config | NEEDED.get(model.model_type, {})


def tiny_overrides(model_type: str) -> dict[str, Any]:
    """A config with 16 experts and a hidden size of 64."""
    own = tiny_models.TINY.get(model_type, _NO_TINY_MODEL.get(model_type, {}))
    return tiny_models.small_sizes(CONFIG_MAPPING[model_type]) | own


def full_cases() -> list[Case]:
    """Every row of the catalog with a class, at its full size."""
    cases = []
    for model in models():
        model_type = transformers_type(model)
        if model_type is not None:
            dtypes = ("float32", "bfloat16") if model_type in ROUNDINGS else ("bfloat16",)
            for dtype in dtypes:
                is_hash = "hash_moe" in model.config.get("mlp_layer_types", ())
                name = f"{model.name} {dtype}"
                cases.append(Case(name, model_type, row_overrides(model), dtype, 32, is_hash))
    return cases


def tiny_cases() -> list[Case]:
    """Every type with a class, and the variants, each in float32 and bfloat16."""
    types = {name: (name, tiny_overrides(name)) for name in transformers_routers.model_types()}
    variants = {
        f"{model_type}, {name}": (model_type, tiny_overrides(model_type) | overrides)
        for model_type, name, overrides in VARIANTS
        if model_type in types
    }
    cases = [
        Case(f"{name} {dtype}", model_type, overrides, dtype, 256, layer=_layer(model_type))
        for name, (model_type, overrides) in (types | variants).items()
        for dtype in ("float32", "bfloat16")
        if f"{name} {dtype}" != "mistral4, groups bfloat16"  # the roundings may swap groups
    ]
    in_hash_layer = {**tiny_overrides("deepseek_v4"), **HASH_LAYER, "mlp_layer_types": ["hash_moe"]}
    for dtype in ("float32", "bfloat16"):
        cases.append(Case(f"deepseek_v4, hash {dtype}", "deepseek_v4", in_hash_layer, dtype, 256, hash_routing=True))
    return cases


def _layer(model_type: str) -> int | None:
    return 1 if model_type == "dots3_note_vision_encoder" else None  # the layers differ; the adapter uses the last


def checked_rows() -> str:
    """The list as Markdown."""
    checked = [(model, name) for model in models() if (name := transformers_type(model)) is not None]
    unchecked = [model for model in models() if transformers_type(model) is None]
    named = {name for _, name in checked}
    lines = [_HEAD.strip().format(len(checked), len(models())), "", *_table(_ROW_COLUMNS, map(_row, checked))]
    lines += ["", _UNNAMED.strip(), ""]
    unnamed = [name for name in transformers_routers.model_types() if name not in named]
    lines += _table(_TYPE_COLUMNS, ((f"`{name}`", *_how(name)) for name in unnamed))
    lines += ["", _UNCHECKED.strip(), ""]
    rows = ((model.name, f"`{model.model_type}`", model.semantics_source) for model in unchecked)
    return "\n".join([*lines, *_table(("Model", "Model type", "Behaviour read from"), rows)]) + "\n"


_HEAD = """
# Which routers are checked against Transformers

Written by `python tests/support/router_cases.py`; `tests/test_transformers_routers.py` does the checks and says how.

{} of {} named models have a router class in Transformers. Each is checked at its full size, with random weights on a
CPU: the same experts outside the margin of [the contract](contract.md), the same weights within its bounds. "Exact
dtype" is the model's dtype in which the class computes what its `RouterSpec` says, and nothing more.
"""
_UNNAMED = """
## Model types without a named model

Checked at a size of 16 experts, as are all types above.
"""
_UNCHECKED = """
## Not checked

Transformers has no class for these.
"""
_ROW_COLUMNS = ("Model", "Model type", "Transformers class", "Exact dtype", "Note")
_TYPE_COLUMNS = _ROW_COLUMNS[1:]


def _row(row: tuple[Model, str]) -> tuple[str, ...]:
    model, name = row
    loaded = "" if name == model.model_type else f", loaded as `{name}`"
    return ", ".join((model.name, *model.also)), f"`{model.model_type}`{loaded}", *_how(name, model.spec.hash_routing)


def _how(name: str, hash_routing: bool = False) -> tuple[str, str, str]:
    """Class, exact dtype and note of a type."""
    notes = []
    if name in ROUNDINGS:
        notes.append(f"in bfloat16, the class also rounds {ROUNDINGS[name].where}: held within these roundings")
    if model_types()[name].casts_weights:
        notes.append("the class rounds its weights to bfloat16")
    router = transformers_routers.HASH_ROUTER if hash_routing else model_types()[name].router
    return f"`{router}`", exact_dtype(name), "; ".join(notes)


def _table(columns: tuple[str, ...], rows: Any) -> list[str]:
    return [" | ".join(cells).join(("| ", " |")) for cells in (columns, ["---"] * len(columns), *rows)]


if __name__ == "__main__":
    print(checked_rows(), end="")
