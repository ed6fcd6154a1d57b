"""The signatures of vLLM that this package relies on: private ones, which may change with any release."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

LAYERS = "vllm.model_executor.layers.fused_moe"


class Relied(NamedTuple):
    """A function, and the parameters that moegate's code counts on."""

    module: str
    name: str
    needed: tuple[str, ...]
    is_exact: bool = False
    """True: another parameter would mean a routing that moegate does not know."""

    def why_not(self, found: tuple[str, ...] | None) -> str | None:
        """What does not fit of the parameters that were found (None: there is no such function)."""
        if found is None:
            return f"{self.module} has no {self.name}"
        missing = [name for name in self.needed if name not in found]
        if missing:
            return f"{self.name} of {self.module} has no parameter {missing[0]}"
        others = [name for name in found if name not in self.needed]
        return f"{self.name} of {self.module} has another parameter, {others[0]}" if self.is_exact and others else None


RELIED_ON = (
    Relied("vllm.model_executor.custom_op", "PluggableLayer.register_oot", ("name",)),
    Relied(
        f"{LAYERS}.runner.moe_runner",
        "MoERunner.__init__",
        ("layer_name", "moe_config", "router", "routed_experts", "gate", "shared_expert_gate"),
    ),
    Relied(
        f"{LAYERS}.runner.moe_runner",
        "MoERunner._forward_impl",
        ("self", "hidden_states", "router_logits", "shared_experts_input", "input_ids"),
        is_exact=True,
    ),
    Relied(f"{LAYERS}.runner.moe_runner", "MoERunner.do_naive_dispatch_combine", ("self",), is_exact=True),
    Relied(
        f"{LAYERS}.router.base_router",
        "BaseRouter._compute_routing",
        ("self", "hidden_states", "router_logits", "indices_type", "input_ids"),
        is_exact=True,
    ),
    Relied(f"{LAYERS}.router.gate_linear", "GateLinear.__init__", ("input_size", "output_size", "bias", "out_dtype")),
    Relied(f"{LAYERS}.router.gate_linear", "GateLinear.forward", ("self", "x"), is_exact=True),
    Relied(
        "vllm.model_executor.layers.linear",
        "UnquantizedLinearMethod.process_weights_after_loading",
        ("self", "layer"),
        is_exact=True,
    ),
)

ParametersOf = Callable[[str, str], "tuple[str, ...] | None"]
"""(module, dotted name in it) -> the parameters of a function, or of a property's getter; None: there is none."""


def why_not(parameters_of: ParametersOf) -> str | None:
    """The first thing in vLLM that is not as moegate's code needs it; None: all is."""
    found = (each.why_not(parameters_of(each.module, each.name)) for each in RELIED_ON)
    return next((reason for reason in found if reason is not None), None)


def installed_parameters(module: str, name: str) -> tuple[str, ...] | None:
    """What the installed vLLM has."""
    try:
        found: object = import_module(module)
    except ModuleNotFoundError:
        return None
    for part in name.split("."):
        found = getattr(found, part, None)
    if isinstance(found, property):
        found = found.fget
    return tuple(inspect.signature(found).parameters) if callable(found) else None
