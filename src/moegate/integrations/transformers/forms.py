"""What the catalog does not say of a router class of Transformers: its tensors' names, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from moegate.configs.model_types import model_types
from moegate.routing import Routing
from moegate.spec import RouterSpec

HASH_ROUTER = "DeepseekV4HashRouter"
"""The second class of model type deepseek_v4, for its first layers."""


@dataclass(frozen=True)
class Form:
    """How a class differs from one with `forward(hidden_states) -> (logits, topk_weights, topk_ids)`."""

    returns: tuple[str, ...] = ("logits", "topk_weights", "topk_ids")
    """Names of `OUTPUTS`."""
    names: Mapping[str, str] = field(default_factory=dict)
    """Role of a tensor -> its name in the module, where the two differ."""
    argument: str | None = None
    """The role of the second argument of `forward`; a correction bias may be held by the block around the router."""
    flattens: bool = True
    """`hidden_states` may have more than two dimensions, and all but the last become one."""
    reads: tuple[str, ...] = ()
    """What the forward reads of the router's config in each call."""
    rounds_logits: bool = False
    """The class multiplies in the dtype of its weight, where the spec of its models says float32."""
    casts_weights_to: str | None = None
    """Whose dtype `topk_weights` have: "hidden_states" or "weight"; None: what the catalog says of the cast."""


def _logits(routing: Routing, spec: RouterSpec) -> Tensor:
    assert routing.logits is not None
    return routing.logits


def _transformed(routing: Routing, spec: RouterSpec) -> Tensor:
    logits = _logits(routing, spec).float()
    if spec.logit_multiplier != 1.0:
        logits = logits * spec.logit_multiplier
    if spec.logit_softcapping is not None:
        logits = torch.tanh(logits / spec.logit_softcapping) * spec.logit_softcapping
    return logits


def _scores_of_all(routing: Routing, spec: RouterSpec) -> Tensor:
    """The weights at the columns of their experts, and 0 in all other columns."""
    zeros = torch.zeros_like(_logits(routing, spec))
    return zeros.scatter(1, routing.topk_ids, routing.topk_weights.to(zeros.dtype))


OUTPUTS: dict[str, Callable[[Routing, RouterSpec], Tensor | None]] = {
    "logits": _logits,
    "logits in float32": lambda routing, spec: _logits(routing, spec).float(),
    "transformed logits": _transformed,
    "experts' logits": lambda routing, spec: _logits(routing, spec)[:, : spec.num_experts],
    "probabilities": lambda routing, spec: _logits(routing, spec).softmax(dim=-1, dtype=torch.float32),
    "scores of all": _scores_of_all,
    "topk_weights": lambda routing, spec: routing.topk_weights,
    "topk_ids": lambda routing, spec: routing.topk_ids,
    "shared_weights": lambda routing, spec: routing.shared_weights,
}
"""What a class may return."""

_SELECTED = ("topk_weights", "topk_ids")
_UPCAST = ("logits in float32", *_SELECTED)
_BIAS = "e_score_correction_bias"
_MOE_STATICS = Form(names={_BIAS: "moe_statics.e_score_correction_bias"}, flattens=False)
_ROWS = Form(flattens=False)
_ROWS_UPCAST = Form(_UPCAST, flattens=False)
_GEMMA4 = Form(
    ("probabilities", *_SELECTED),
    names={"weight": "proj.weight", "input_scale": "scale"},
    flattens=False,
    reads=("config.top_k_experts",),
)

_FORMS = {
    "AfmoeTokenChoiceRouter": Form(_UPCAST, names={"weight": "gate.weight"}, argument=_BIAS),
    "AriaTextTopKRouter": _ROWS,
    "Cohere2MoeTopKRouter": _ROWS,
    "DeepseekV4HashRouter": Form(argument="input_ids", rounds_logits=True, casts_weights_to="weight"),
    "DeepseekV4TopKRouter": Form(rounds_logits=True, casts_weights_to="weight"),
    "DiffusionGemmaTextRouter": _GEMMA4,
    "Dots3NoteVisionTopKRouter": Form(argument=_BIAS),
    "Ernie4_5_MoeTopKRouter": _MOE_STATICS,
    "Ernie4_5_VLMoeMoeTopKRouter": _MOE_STATICS,
    "Gemma4TextRouter": _GEMMA4,
    "GptOssTopKRouter": _ROWS,
    "GraniteMoeHybridTopKRouter": _ROWS_UPCAST,
    "GraniteMoeSWATopKRouter": _ROWS_UPCAST,
    "GraniteMoeSharedTopKRouter": _ROWS_UPCAST,
    "GraniteMoeTopKRouter": _ROWS_UPCAST,
    "HYV3TopKRouter": Form(argument=_BIAS),
    "HunYuanMoEV1Gate": Form(names={"weight": "wg.weight"}, rounds_logits=True, casts_weights_to="weight"),
    "InklingTopkRouter": Form(("experts' logits", *_SELECTED, "shared_weights")),
    "JambaTopKRouter": _ROWS,
    "LagunaTopKRouter": Form(("transformed logits", *_SELECTED)),
    "Lfm2MoeTopKRouter": Form(argument=_BIAS, flattens=False, casts_weights_to="weight"),
    "Llama4Router": Form(("scores of all", "logits"), flattens=False),
    "LongcatFlashTopkRouter": Form(names={"weight": "classifier.weight", "bias": "classifier.bias"}),
    "MiniMaxM2TopKRouter": Form(argument=_BIAS, rounds_logits=True),
    "MiniMaxM3VLTopKRouter": Form(rounds_logits=True),
    "Mistral4TopkRouter": Form(casts_weights_to="weight"),
    "MuseSparkTopkRouter": Form(("transformed logits", *_SELECTED)),
    "OpenAIPrivacyFilterTopKRouter": _ROWS,
    "Step3p7TopKRouter": Form(rounds_logits=True),
}

LEFT = {
    "DbrxRouter": "its class returns logits alone, and the block around it selects",
    "JetMoeTopKGating": "its class sorts the tokens by expert, and reads the counts back",
}
"""Router classes of the catalog that stay Transformers' own, with the reason."""


@cache
def types_of_classes() -> dict[str, str]:
    """Name of a router class of Transformers -> model type, whose module defines the class."""
    found = {entry.router: name for name, entry in model_types().items() if entry.router is not None}
    return found | {HASH_ROUTER: "deepseek_v4"}


def form_of(class_name: str) -> Form:
    """The form of a router class."""
    return _FORMS.get(class_name, Form())
