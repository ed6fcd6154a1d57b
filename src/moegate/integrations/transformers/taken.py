"""What moegate knows of one router module of a model: its spec, what its class returns, when moegate may route."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from moegate.configs.model_types import model_types
from moegate.functional import route
from moegate.integrations.engines import logits_dtype
from moegate.integrations.takeover import LeftToEngineError
from moegate.integrations.transformers.forms import HASH_ROUTER, OUTPUTS, form_of, types_of_classes
from moegate.noticing import requires_grad
from moegate.plain import is_compiling, is_plain
from moegate.routing import FLOATS, inputs_of
from moegate.spec import RouterSpec

_log = logging.getLogger("moegate")

_WARM_UP_TOKENS = (1, 4, 16, 64, 1024)
"""Numbers of tokens between which the kernels change."""


class TakenRouter:
    """A router that moegate routes.

    Args:
        router: The module; its tensors may be on meta.
        config: The config that the module was made from, or the model's.
        layer: The number of the layer, for models whose layers differ; None: unknown.

    Raises:
        LeftToEngineError: The module stays Transformers' own, for the reason in the text.
    """

    def __init__(self, router: nn.Module, config: Any, layer: int | None) -> None:
        name = type(router).__name__
        form, entry = form_of(name), model_types()[types_of_classes()[name]]
        self.returns = form.returns
        self.flattens = form.flattens
        self.exact = _spec(name, config, layer, torch.float32)
        rounded = _spec(name, config, layer, torch.bfloat16)
        self.rounds = form.rounds_logits or rounded.logits_dtype != self.exact.logits_dtype
        rounded = replace(rounded, logits_dtype=logits_dtype("bfloat16")) if self.rounds else rounded
        cast_to = form.casts_weights_to or ("hidden_states" if entry.casts_weights else None)
        self.specs = {
            (weight, hidden): _with_weights(rounded if weight == torch.bfloat16 else self.exact, found)
            for weight, hidden in product(FLOATS, FLOATS)
            for found in [{"hidden_states": hidden, "weight": weight, None: torch.float32}[cast_to]]
        }
        roles = [given.name for given in inputs_of(self.exact) if given.is_needed]
        self.tensors = tuple((role, form.names.get(role, role)) for role in roles if role != form.argument)
        self.argument = form.argument if form.argument in (*roles, "input_ids") else None
        self.model_dtype: torch.dtype | None = getattr(config, "dtype", None)
        self.settings = settings_of(router)
        self.inner = inner_of(router)
        self.takes_second = form.argument is not None

    def spec_for(self, weight_dtype: torch.dtype, hidden_dtype: torch.dtype) -> RouterSpec:
        """What the class computes of these dtypes."""
        return self.specs[weight_dtype, hidden_dtype]

    def why_not_in_all_calls(self, router: nn.Module) -> str | None:
        """Why Transformers' own forward has to compute every call of a router as it is now; None: moegate may."""
        tensors = [_tensor(router, name) for _, name in self.tensors]
        weight = tensors[0]
        if not is_compiling() and not all(map(is_plain, tensors)):
            return f"its weight is a {type(weight).__name__}"
        if not all(_attribute(router, name) == value for name, value in self.settings):
            return "a setting of the router was changed"
        if weight.dtype not in FLOATS:
            return f"its weight is {weight.dtype}"
        if self.rounds and weight.dtype == torch.float16:
            return "it rounds its logits to float16"
        return self._why_not_inner(router)

    def why_not_now(self, router: nn.Module, hidden: Tensor) -> str | None:
        """Why Transformers' own forward has to compute this call; None: moegate may."""
        tensors = [_tensor(router, name) for _, name in self.tensors]
        weight = tensors[0]
        # In training also without grad mode: reentrant checkpointing runs a step twice, once in each mode.
        if (torch.is_grad_enabled() or router.training) and requires_grad((hidden, *tensors)):
            return "a gradient is wanted, and none flows through moegate's routing"
        kind = hidden.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return "autocast is on"
        if (reason := self.why_not_in_all_calls(router)) is not None:
            return reason
        if hidden.dtype not in FLOATS:
            return f"hidden_states are {hidden.dtype}"
        if self.rounds and weight.dtype not in (torch.float32, hidden.dtype):
            return f"it rounds hidden_states to {weight.dtype}"
        if hidden.dim() != 2 and not self.flattens:
            return "hidden_states have more than two dimensions"
        if weight.shape != (self.exact.num_gate_rows, self.exact.hidden_size):
            return "its weight has another shape than its config says"
        if any(tensor.device != hidden.device or tensor.stride()[-1:] not in ((1,), ()) for tensor in tensors):
            return "one of its tensors is strided, or on another device"
        return None

    def _why_not_inner(self, router: nn.Module) -> str | None:
        """What was done to a module inside of the router, whose weight alone moegate would read."""
        for name, kind in self.inner:
            module = router.get_submodule(name)
            if type(module) is not kind or "forward" in vars(module):
                return f"its {name} was replaced"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"its {name} has hooks"
        return None

    @torch.no_grad()
    def warm_up(self, router: nn.Module) -> None:
        """On a GPU: compiles what calls in the model's dtype run."""
        weight = _tensor(router, self.tensors[0][1])
        if not weight.is_cuda or self.argument is not None:
            return
        for tokens in _WARM_UP_TOKENS:
            shape = tokens, self.exact.hidden_size
            hidden = torch.zeros(shape, dtype=self.model_dtype or weight.dtype, device=weight.device)
            if self.why_not_now(router, hidden) is None:
                self.route(router, hidden)

    def route(self, router: nn.Module, hidden: Tensor, second: Tensor | None = None) -> Any:
        """What the class returns, of moegate's routing."""
        given: dict[str, Any] = {role: _tensor(router, name) for role, name in self.tensors}
        weight = given.pop("weight")
        if self.argument is not None and second is not None:
            given[self.argument] = second.reshape(-1)
        if "e_score_correction_bias" in given:
            given["e_score_correction_bias"] = given["e_score_correction_bias"].reshape(-1).float()
        spec = self.spec_for(weight.dtype, hidden.dtype)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        routing = route(rows, weight, spec, **given, return_logits=True)
        assert routing.logits is not None
        if self.rounds and routing.logits.dtype != weight.dtype:  # MOEGATE_LOGITS=float32
            routing = routing._replace(logits=routing.logits.to(weight.dtype))
        return tuple(OUTPUTS[output](routing, spec) for output in self.returns)


def _spec(class_name: str, config: Any, layer: int | None, dtype: torch.dtype) -> RouterSpec:
    """The spec of a router class in a model of this dtype."""
    values = {**config.to_dict(), "dtype": str(dtype).removeprefix("torch.")}
    layers = (layer, *range(values.get("num_hidden_layers") or 0))
    try:
        # Of an unknown layer a config tells the rule of most; the class tells which rule it is.
        found = (RouterSpec.from_config(values, layer=number) for number in layers)
        spec = next(each for each in found if each.hash_routing == (class_name == HASH_ROUTER))
    except (TypeError, ValueError, StopIteration) as error:
        raise LeftToEngineError(str(error) or "no layer of its config has this router") from None
    factor = model_types()[types_of_classes()[class_name]].output_factor
    if factor is not None:  # the block around the router multiplies by the factor, which is in the spec's weights
        spec = replace(spec, routed_scaling_factor=spec.routed_scaling_factor / values[factor])
    # The classes widen a weight of any dtype, where they multiply in float32.
    return replace(spec, weight_dtype="model", topk_ids_dtype="int64")


def _with_weights(spec: RouterSpec, dtype: torch.dtype) -> RouterSpec:
    name: Any = str(dtype).removeprefix("torch.")
    return replace(spec, topk_weights_dtype=name)


def settings_of(router: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What the forward of a router reads beside tensors: its plain attributes, and keys of its config."""
    plain = (bool, int, float, str, type(None))
    attributes = tuple(
        (name, value)
        for name, value in vars(router).items()
        if isinstance(value, plain) and name != "training" and not name.startswith("_")
    )
    return attributes + tuple((name, _attribute(router, name)) for name in form_of(type(router).__name__).reads)


def inner_of(router: nn.Module) -> tuple[tuple[str, type[nn.Module]], ...]:
    """The modules inside of a router, by name."""
    return tuple((name, type(module)) for name, module in router.named_modules() if name)


def _attribute(owner: Any, name: str) -> Any:
    """An attribute by its dotted name."""
    for part in name.split("."):
        owner = getattr(owner, part)
    return owner


def _tensor(router: nn.Module, name: str) -> Tensor:
    """A tensor of a router by its dotted name."""
    value: Tensor = _attribute(router, name)
    return value


def say_once(router: nn.Module, reason: str) -> None:
    """Says that a call went to Transformers' own forward; a compiler hears nothing."""
    if not is_compiling():
        _say(type(router).__name__, reason)


@cache
def _say(name: str, reason: str) -> None:
    _log.warning("%s: Transformers' own forward runs: %s", name, reason)
