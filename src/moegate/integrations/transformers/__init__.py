"""moegate in Transformers: `enable()` for models that are loaded afterwards, `patch(model)` for a live one.

A router then computes with `moegate.route` what its class computed, and returns what its class returned: the same
tensors in the same order, shapes and dtypes. Parameters stay the router's own. Where moegate may not route a call, such
as one that wants a gradient, the class's own forward runs, and a log line says so once.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from types import MethodType
from typing import Any

from torch import nn

from moegate.integrations.engines import TRANSFORMERS
from moegate.integrations.takeover import Takeover
from moegate.integrations.transformers.classes import STATE, generated, is_generated, look_at, put_back, why_not
from moegate.integrations.transformers.forms import types_of_classes
from moegate.integrations.transformers.taken import TakenRouter

__all__ = ["Takeover", "disable", "enable", "patch", "report", "unpatch"]

_log = logging.getLogger("moegate")
_LAYER = re.compile(r"\.(\d+)\.")
# A module of such a name that the catalog does not know is counted, and left.
_ROUTER_NAME = re.compile(r"(Top[kK]Router|MoE\w*Gate|MoeGate)$")


def enable() -> None:
    """Has moegate route in all models that `from_pretrained` and `from_config` make from now on.

    Does nothing but a warning in the log if the installed Transformers is outside of the range that
    docs/transformers.md names.
    """
    if (reason := _aside()) is not None:
        _log.warning("moegate stands aside: %s", reason)
        return
    from transformers.monkey_patching import register_patch_mapping

    register_patch_mapping(_mapping(), overwrite=True)


def disable() -> None:
    """Undoes `enable` for models that are made from now on; models that are there keep their routers."""
    from transformers.monkey_patching import get_patch_mapping, unregister_patch_mapping

    ours, registered = _mapping(), get_patch_mapping()
    unregister_patch_mapping([name for name, found in ours.items() if registered.get(name) is found])
    put_back()


def patch(model: nn.Module) -> Takeover:
    """Has moegate route in a model that is there.

    Args:
        model: A model of Transformers, or a part of one that has a `config`.

    Returns:
        What was taken over, and what was left for which reason; the line is logged at INFO, too. A second call changes
        nothing.
    """
    for _, router, found in list(_look_at(model)):
        if isinstance(found, TakenRouter) and STATE not in vars(router):
            own = type(router)
            new = generated(own.__name__)
            assert new is not None
            router.__class__ = new
            vars(router)[STATE] = found
            _rebind(router, own)
            found.warm_up(router)
    takeover = report(model)
    _log.info("%s", takeover)
    return takeover


def unpatch(model: nn.Module) -> None:
    """Gives a model its own routers back, whether `patch` or `enable` replaced them.

    Args:
        model: The model.
    """
    for router in model.modules():
        if STATE not in vars(router):
            continue
        vars(router).pop(STATE)
        new = type(router)
        if is_generated(new):  # else a class that somebody derived, which finds its own forward without the state
            router.__class__ = new.__mro__[1]
            _rebind(router, new)


def report(model: nn.Module) -> Takeover:
    """Which routers of a model moegate routes, and why not the others.

    Args:
        model: As in `patch`; nothing in it changes.

    Returns:
        The routers by name. One that `patch` would take over is left as "not patched".
    """
    takeover = Takeover()
    for name, router, found in _look_at(model):
        if isinstance(found, str):
            takeover.left[name] = found
        elif isinstance(vars(router).get(STATE), TakenRouter):
            takeover.taken.append(name)
        else:
            takeover.left[name] = "not patched"
    return takeover


def _look_at(model: nn.Module) -> Iterator[tuple[str, nn.Module, TakenRouter | str]]:
    """The routers of a model by name: what moegate would take note of, or why it leaves the router."""
    aside = _aside()
    configs: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = getattr(module, "config", None)
        configs[name] = own if hasattr(own, "to_dict") else configs.get(name.rpartition(".")[0])
        kind = type(module)
        if STATE in vars(module):
            yield name, module, _unless_refused(module, vars(module)[STATE])
            continue
        if kind.__name__ not in types_of_classes():
            if _ROUTER_NAME.search(kind.__name__):
                yield name, module, f"no router class of the catalog: {kind.__name__}"
            continue
        numbered = _LAYER.search(f".{name}.")
        layer = None if numbered is None else int(numbered[1])
        reason = aside or why_not(module, configs[name], layer)
        yield name, module, reason or _unless_refused(module, look_at(module, configs[name], layer))


def _unless_refused(router: nn.Module, found: TakenRouter | str) -> TakenRouter | str:
    """The same, or why no call of a router in its dtype can be moegate's."""
    if isinstance(found, str):
        return found
    if "forward" in vars(router) and "_old_forward" not in vars(router):
        return "its forward was replaced"
    try:
        return found.why_not_in_all_calls(router) or found
    except AttributeError as error:
        return str(error)


def _mapping() -> dict[str, type[nn.Module]]:
    found = {name: generated(name) for name in types_of_classes()}
    # Patterns: Transformers takes an entry by name first, which is somebody else's, and searches any part of a name.
    return {f"^{name}$": new for name, new in found.items() if new is not None}


def _aside() -> str | None:
    """Why moegate takes nothing over; None: it does."""
    return "MOEGATE=0" if os.environ.get("MOEGATE") == "0" else TRANSFORMERS.why_not()


def _rebind(router: nn.Module, before: type[nn.Module]) -> None:
    """Points accelerate's hook, which keeps the bound method that it wrapped, to the forward of the module's class."""
    kept = vars(router).get("_old_forward")
    if getattr(kept, "__func__", None) is before.forward:
        vars(router)["_old_forward"] = MethodType(type(router).forward, router)
