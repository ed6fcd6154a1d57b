"""The generated classes: a router class of Transformers whose forward moegate computes where it may."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import threading
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from moegate.integrations.takeover import LeftToEngineError
from moegate.integrations.transformers.forms import LEFT, types_of_classes
from moegate.integrations.transformers.probe import agrees
from moegate.integrations.transformers.taken import TakenRouter, inner_of, say_once, settings_of

_lock = threading.RLock()
STATE = "_moegate"
"""The attribute of a router module with its `TakenRouter`, or with the reason why there is none."""


class StandsForOriginal(type):
    """Makes `isinstance(router, Generated)` true for a router of the original class, too.

    Transformers replaces the original in the lists of what its models record (`_can_record_outputs`), which all models
    of a class share, and never puts it back.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        if not is_generated(cls):  # somebody's subclass
            return super().__instancecheck__(instance)
        return isinstance(instance, cls.__mro__[1])


def is_generated(kind: type) -> bool:
    """True for a generated class; False for a subclass of one, too."""
    return isinstance(kind, StandsForOriginal) and kind.__module__ == __name__ and kind.__name__ in types_of_classes()


@cache
def original(class_name: str) -> type[nn.Module] | None:
    """The router class of that name in Transformers; None: there is none, or its module cannot be imported here."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = types_of_classes()[class_name]
    if model_type not in CONFIG_MAPPING:
        return None
    modeling = CONFIG_MAPPING[model_type].__module__.replace(".configuration_", ".modeling_")
    try:
        return getattr(importlib.import_module(modeling), class_name, None)
    except ImportError:  # its model cannot be loaded either: some modules need torchvision
        return None


def generated(class_name: str) -> type[nn.Module] | None:
    """The class that takes the place of a router class of Transformers; None: that class stays, or there is none."""
    with _lock:
        return _generated(class_name)


@cache
def _generated(class_name: str) -> type[nn.Module] | None:
    own = original(class_name)
    if own is None or class_name in LEFT:
        return None

    signature, own_forward = inspect.signature(own.__init__), own.forward

    def init(self: nn.Module, *arguments: Any, **named: Any) -> None:
        own.__init__(self, *arguments, **named)
        given = signature.bind(self, *arguments, **named).arguments
        if type(self) is generated(class_name):
            vars(self)[STATE] = look_at(self, given["config"], given.get("layer_idx"))

    @functools.wraps(own.forward)
    def forward(self: nn.Module, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        taken = vars(self).get(STATE)
        if not isinstance(taken, TakenRouter) or len(arguments) + len(named) != taken.takes_second:
            return own.forward(self, hidden_states, *arguments, **named)
        changed = own.forward is not own_forward
        reason = "its class was changed" if changed else taken.why_not_now(self, hidden_states)
        if reason is not None:
            say_once(self, reason)
            return own.forward(self, hidden_states, *arguments, **named)
        return taken.route(self, hidden_states, *arguments, *named.values())

    # The original's name, by which Transformers and its quantisers know a router.
    members = {"__init__": init, "forward": forward, "__module__": __name__}
    return cast("type[nn.Module]", StandsForOriginal(class_name, (own,), members))


def put_back() -> None:
    """Puts Transformers' own classes back where a load that failed, or two at once, left generated ones."""
    modules = [module for name, module in list(sys.modules.items()) if name.startswith("transformers")]
    for class_name in types_of_classes():
        new = generated(class_name)
        for module in modules:
            if new is not None and vars(module).get(class_name) is new:
                setattr(module, class_name, original(class_name))


def look_at(router: nn.Module, config: Any, layer: int | None) -> TakenRouter | str:
    """What moegate knows of a router; or why the router stays Transformers' own."""
    name = type(router).__name__
    try:
        taken = TakenRouter(router, config, layer)
        key = name, taken.settings, taken.exact
        if key not in _agrees:
            with torch.device("cpu"):  # a model that is being loaded is made on meta
                _agrees[key] = agrees(_made(name, config, layer).float(), taken)
        return taken if _agrees[key] else "on random numbers it does not compute what its config says"
    except LeftToEngineError as error:
        return str(error)
    except Exception as error:  # a config or a class of another kind; a model must not fail to load for that
        return f"{type(error).__name__}: {error}"


_agrees: dict[Any, bool] = {}


def _made(class_name: str, config: Any, layer: int | None) -> nn.Module:
    """A router of the class as Transformers makes it."""
    kind = original(class_name)
    assert kind is not None
    return kind(config, layer) if "layer_idx" in inspect.signature(kind.__init__).parameters else kind(config)


def why_not(router: nn.Module, config: Any, layer: int | None) -> str | None:
    """Why a router of a model that is there cannot become one of a generated class; None: it can."""
    kind = type(router)
    if kind is not original(kind.__name__):
        return f"its class {kind.__name__} is not Transformers' own"
    if kind.__name__ in LEFT:
        return LEFT[kind.__name__]
    wrapped = vars(router).get("_old_forward", vars(router).get("forward"))  # accelerate's hook keeps the former
    if wrapped is not None and getattr(wrapped, "__func__", None) is not kind.forward:
        return "its forward was replaced"
    # What its forward reads must be what its config says.
    try:
        with torch.device("meta"):
            fresh = _made(kind.__name__, config, layer)
    except Exception as error:
        return f"its config makes no such router: {type(error).__name__}: {error}"
    differs = dict(set(settings_of(router)) ^ set(settings_of(fresh)))
    if differs:
        return f"its {', '.join(sorted(differs))} is not what its config says"
    inside = dict(set(inner_of(router)) ^ set(inner_of(fresh)))
    return f"its {min(inside)} was replaced" if inside else None


def __getattr__(name: str) -> type[nn.Module]:
    """A generated class by its name, for pickle."""
    found = generated(name) if name in types_of_classes() else None
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
