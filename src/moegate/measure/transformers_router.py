"""A peer: the router class of the installed Transformers."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moegate.configs.model_types import model_types
from moegate.measure.plain import Chosen
from moegate.routing import RouterTensors

_KNOWN = {"weight", "bias", "e_score_correction_bias"}


class TransformersRouter(NamedTuple):
    """The router class of a model."""

    route: Callable[[Tensor, Tensor], Chosen]
    """(hidden [M, K], weight [R, K]) -> ids and weights."""
    output_factor: float
    """The factor by which the model multiplies the summed expert output; a `Routing` has the factor in its weights."""


def transformers_router(config: dict[str, Any], tensors: RouterTensors, device: torch.device) -> TransformersRouter:
    """The router class of the config's model type, with these tensors.

    Raises:
        NotImplementedError: There is no class; or the class has other tensors or returns another result than usual.
        Exceptions of importing Transformers and of building the config are passed on.
    """
    model_type = str(config["model_type"])
    name, factor = model_types()[model_type].router, model_types()[model_type].output_factor
    if name is None or tensors.tid2eid is not None:
        raise NotImplementedError(f"Transformers has no class for this router of {model_type!r}")
    mapping = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING
    if model_type not in mapping:
        raise NotImplementedError(f"this Transformers does not know {model_type!r}")
    built = mapping[model_type](**{key: value for key, value in config.items() if key != "model_type"})
    module = import_module(type(built).__module__.replace(".configuration_", ".modeling_"))
    router = getattr(module, name)(built).to(device=device, dtype=torch.bfloat16).eval().requires_grad_(False)
    held = dict([*router.named_parameters(), *router.named_buffers()])
    if "weight" not in held or not set(held) <= _KNOWN:
        raise NotImplementedError(f"{name} holds {', '.join(held)}")
    for key in held.keys() - {"weight"}:
        held[key].data = getattr(tensors, key)

    def route(hidden: Tensor, weight: Tensor) -> Chosen:
        held["weight"].data = weight
        found = router(hidden)
        if not isinstance(found, tuple) or len(found) != 3 or found[2].is_floating_point():
            raise NotImplementedError(f"{name} does not return (logits, weights, ids)")
        return found[2], found[1]

    return TransformersRouter(route, 1.0 if factor is None else getattr(built, factor))
