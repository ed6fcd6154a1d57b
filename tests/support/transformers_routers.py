"""Transformers' own router classes behind one interface, for tests that compare moegate's routers with them.

`build("deepseek_v3", {"n_group": 8}, torch.bfloat16, seed=0)` constructs the router class alone (never a
whole model, so that full sizes stay cheap), fills it with random values and returns something to call. Where
a model does a part of the routing outside of that class, the adapter does this part and names its source.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moegate import RouterSpec, Routing
from moegate.configs.model_types import model_types as catalog_types
from moegate.contract.reference import choice_keys, finite_logits
from moegate.routing import RouterTensors

HASH_ROUTER = "DeepseekV4HashRouter"

Output = tuple[Tensor | None, Tensor, Tensor, Tensor | None]
"""(logits, ids [M, k], weights [M, k] in float32, weights of the shared experts)"""


@dataclass(frozen=True)
class Quirk:
    """How a family differs from a router that is built from its config and returns (logits, weights, ids)."""

    construct: Callable[[type[nn.Module], PreTrainedConfig], nn.Module] | None = None
    names: dict[str, str] = field(default_factory=dict)
    """role -> name of the tensor in the router, where the two differ"""
    bias_is_argument: bool = False
    """the correction bias belongs to the block around the router, which passes it to each call"""
    unpack: Callable[["TransformersRouter", Any], Output] | None = None
    batch_dimension: bool = False
    float32_weight: bool = False
    """the gate's weight stays in float32 when the model is in another dtype"""
    bias_std: Callable[[int], float] = lambda num_experts: 0.1
    weight_std: Callable[[PreTrainedConfig, int], float] = lambda config, k: 1.25 * k**-0.5
    """standard deviation that gives logits a standard deviation of 1.25 for hidden states drawn from randn"""


class TransformersRouter:
    """A router of Transformers, alone or in a model; see the module's docstring."""

    def __init__(self, config: PreTrainedConfig, router: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.config = config
        self.router = router
        self.tensors = tensors
        self._quirk = QUIRKS.get(config.model_type, Quirk())

    @property
    def takes_batches(self) -> bool:
        """True if the class takes [B, T, K] alone."""
        return self._quirk.batch_dimension

    @torch.no_grad()
    def __call__(self, hidden: Tensor, input_ids: Tensor | None = None) -> Output:
        return self.read(self.router(*self.arguments(hidden, input_ids)))

    def arguments(self, hidden: Tensor, input_ids: Tensor | None) -> list[Tensor | None]:
        """What the model passes to the router class."""
        arguments: list[Tensor | None] = [hidden.unsqueeze(0) if self._quirk.batch_dimension else hidden]
        if "tid2eid" in self.tensors:
            arguments.append(input_ids)
        if self._quirk.bias_is_argument:
            arguments.append(self.tensors.get("e_score_correction_bias"))
        return arguments

    def unpack(self, output: Any) -> Output:
        """The result of a router class, in one form for all classes; of `weights`, in the class's dtype."""
        if self._quirk.unpack is not None:
            return self._quirk.unpack(self, output)
        logits, weights, ids = output
        return logits, weights, ids, None

    def read(self, output: Any) -> Output:
        """The result of a router class, with the weights that a `RouterSpec` defines."""
        logits, weights, ids, shared = self.unpack(output)
        weights = weights.float()
        output_factor = catalog_types()[self.config.model_type].output_factor
        if output_factor is not None:
            weights = weights * getattr(self.config, output_factor)
        return logits, ids, weights, None if shared is None else shared.float()


def as_routing(output: Output, exact_logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> Routing:
    """A class's output for `verify_routing`, in the order of the exact keys, since a class's topk need not sort."""
    _, ids, weights, shared = output
    if not spec.hash_routing:
        keys = choice_keys(finite_logits(exact_logits, torch.float64), spec, tensors)
        order = keys.gather(-1, ids).argsort(dim=-1, descending=True)
        ids, weights = ids.gather(-1, order), weights.gather(-1, order)
    dtype = getattr(torch, spec.topk_weights_dtype)
    mass = weights.masked_fill(ids < spec.num_experts, 0).sum(dim=-1).to(dtype) if spec.num_zero_experts else None
    shared = None if shared is None else shared.to(dtype)
    return Routing(ids.to(torch.int32), weights.to(dtype), shared_weights=shared, identity_weight=mass)


def build(
    model_type: str,
    config_overrides: dict[str, Any],
    dtype: torch.dtype,
    seed: int,
    hash_routing: bool = False,
) -> TransformersRouter:
    """The router of a model_type, with the config class's defaults and `config_overrides`.

    hash_routing: the router of DeepSeek-V4's first layers, in place of that of its other layers.
    """
    config = CONFIG_MAPPING[model_type](**config_overrides)
    config.dtype = dtype
    router_class = getattr(_modeling(type(config)), class_name(model_type, hash_routing))
    quirk = QUIRKS.get(model_type, Quirk())
    router = quirk.construct(router_class, config) if quirk.construct else router_class(config)
    router.to(dtype).eval().requires_grad_(False)

    held: dict[str, Tensor] = dict([*router.named_parameters(), *router.named_buffers()])
    roles: dict[str, str] = {name: role for role, name in quirk.names.items()}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name in held:
        role = roles.get(name, name)
        value = _random(role, held[name].shape, dtype, quirk, config, generator)
        _assign(router, name, value)
        tensors[role] = value
    if quirk.bias_is_argument and getattr(config, "use_expert_bias", True):
        shape = tensors["weight"].shape[:1]
        role = "e_score_correction_bias"
        tensors[role] = _random(role, shape, dtype, quirk, config, generator)
    for role in tensors.keys() - {"weight", "tid2eid"}:
        tensors[role] = tensors[role].reshape(-1)  # ERNIE holds its bias as [1, N]
    return TransformersRouter(config, router, tensors)


def _random(
    role: str,
    shape: torch.Size,
    dtype: torch.dtype,
    quirk: Quirk,
    config: PreTrainedConfig,
    generator: torch.Generator,
) -> Tensor:
    def randn(std: float, mean: float = 0.0) -> Tensor:
        return torch.randn(shape, generator=generator) * std + mean

    match role:
        case "weight":
            value = randn(quirk.weight_std(config, shape[-1]))
            return value if quirk.float32_weight else value.to(dtype)
        case "e_score_correction_bias":
            return randn(quirk.bias_std(shape[-1]))  # float32 in every model, whatever its dtype
        case "bias":
            return randn(0.5).to(dtype)
        case "per_expert_scale" | "input_scale":
            return randn(0.2, mean=1.0).to(dtype)
        case "global_scale":
            return randn(0.2, mean=1.0)
        case "tid2eid":
            order = torch.rand((shape[0], config.num_local_experts), generator=generator).argsort(dim=-1)
            return order[:, : shape[1]].contiguous()
    raise ValueError(f"the router of {config.model_type} holds a tensor that the adapter does not know: {role}")


def _assign(router: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = router.get_submodule(parent)
    # Replaced, since a copy into a tensor that is pinned to float32 would keep the dtype that `.to(dtype)` gave it.
    getattr(module, leaf).data = value.clone()


@cache
def _routers() -> dict[str, str]:
    found = {name: entry.router for name, entry in catalog_types().items() if entry.router is not None}
    return {name: router for name, router in found.items() if name in CONFIG_MAPPING}


def class_name(model_type: str, hash_routing: bool = False) -> str:
    """The router class of a model type."""
    return HASH_ROUTER if hash_routing else _routers()[model_type]


def model_types() -> list[str]:
    """Every model_type that `build` knows and the installed Transformers has."""
    return sorted(_routers())


def _modeling(config_class: type[PreTrainedConfig]) -> ModuleType:
    return importlib.import_module(config_class.__module__.replace(".configuration_", ".modeling_"))


# Families that return something else than (logits, weights, ids).


def _gemma4(_: TransformersRouter, output: Any) -> Output:
    _, weights, ids = output  # probabilities instead of logits
    return None, weights, ids, None


def _inkling(_: TransformersRouter, output: Any) -> Output:
    logits, weights, ids, shared = output
    return logits, weights, ids, shared


def _llama4(adapter: TransformersRouter, output: Any) -> Output:
    scores, logits = output  # scores of all experts, 0 where not selected; the next line selects as the class does
    ids = logits.topk(adapter.router.top_k, dim=1).indices
    return logits, scores.gather(1, ids), ids, None


def _dbrx(adapter: TransformersRouter, output: Any) -> Output:
    # Softmax and top-k are a method of the feed-forward block that holds the router.
    block = SimpleNamespace(
        top_k=adapter.config.ffn_config.moe_top_k,
        moe_normalize_expert_weights=adapter.config.ffn_config.moe_normalize_expert_weights,
    )
    weights, ids = _modeling(type(adapter.config)).DbrxFFN.route_tokens_to_experts(block, output)
    return output, weights, ids, None


def _jetmoe(adapter: TransformersRouter, output: Any) -> Output:
    order, _, sorted_weights, _, logits = output  # weights sorted by expert; restore the order of the choice
    ids = logits.topk(adapter.router.top_k, dim=1).indices
    weights = torch.empty_like(sorted_weights)
    weights[order] = sorted_weights
    return logits, weights.view_as(ids), ids, None


_GEMMA4 = Quirk(
    names={"weight": "proj.weight", "input_scale": "scale"},
    unpack=_gemma4,
    weight_std=lambda config, k: 1.25,  # the router scales its input by K**-0.5 itself
)
_ERNIE = Quirk(
    names={"e_score_correction_bias": "moe_statics.e_score_correction_bias"},
    float32_weight=True,
    bias_std=lambda num_experts: 1 / num_experts,  # it is added to probabilities
)

QUIRKS: dict[str, Quirk] = {
    "afmoe": Quirk(names={"weight": "gate.weight"}, bias_is_argument=True, batch_dimension=True),
    "beam": Quirk(float32_weight=True),
    "dbrx": Quirk(
        construct=lambda router, config: router(config.ffn_config),
        names={"weight": "layer.weight"},
        unpack=_dbrx,
    ),
    "diffusion_gemma_text": _GEMMA4,
    # Every layer has its own number of experts; the config's general numbers are those of the last layer.
    "dots3_note_vision_encoder": Quirk(
        construct=lambda router, config: router(config.per_layer_config[config.num_hidden_layers - 1]),
        bias_is_argument=True,
    ),
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_vl_moe_text": _ERNIE,
    "flint": Quirk(float32_weight=True),
    "gemma4_text": _GEMMA4,
    "hunyuan_v1_moe": Quirk(
        construct=lambda router, config: router(config, layer_idx=0),
        names={"weight": "wg.weight"},
        float32_weight=True,
    ),
    "hy_v3": Quirk(bias_is_argument=True),
    "inkling_text": Quirk(unpack=_inkling),
    "inkling2_loop_text": Quirk(float32_weight=True),
    "inkling2_text": Quirk(float32_weight=True),
    "jetmoe": Quirk(
        construct=lambda router, config: router(
            config.hidden_size, config.num_local_experts, config.num_experts_per_tok
        ),
        names={"weight": "layer.weight"},
        unpack=_jetmoe,
    ),
    "lfm2_moe": Quirk(bias_is_argument=True),
    "llama4_text": Quirk(unpack=_llama4),
    "longcat_flash": Quirk(
        names={"weight": "classifier.weight"},
        float32_weight=True,
        bias_std=lambda num_experts: 1 / num_experts,
    ),
    # Engines keep the gates of MiniMax-M2, M3 and Step in float32. No class of Transformers pins them, but
    # these multiply in the dtype of the weight.
    "minimax_m2": Quirk(bias_is_argument=True, float32_weight=True),
    "minimax_m3_vl_text": Quirk(float32_weight=True),
    "mistral_large4_text": Quirk(float32_weight=True),
    "muse_spark_text": Quirk(
        float32_weight=True, weight_std=lambda config, k: 1.25 * k**-0.5 / config.output_multiplier
    ),
    "step3p5": Quirk(float32_weight=True),
}
