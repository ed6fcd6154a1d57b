"""What the plugin does where it is switched on: replaces two of vLLM's classes."""

from __future__ import annotations

import os

from vllm import envs
from vllm.logger import init_logger

from moegate import __version__
from moegate.integrations.engines import VLLM, logits_dtype
from moegate.integrations.takeover import LeftToEngineError
from moegate.integrations.vllm import signatures

# Below "vllm", the logger that vLLM shows.
logger = init_logger("vllm.moegate")


def register_layers() -> None:
    """Replaces `MoERunner` and `GateLinear`, or warns why not; a second call changes nothing."""
    try:
        _replace_classes()
    except LeftToEngineError as error:
        logger.warning("moegate stands aside: %s", error)
    except Exception:  # vLLM does not catch what a plugin raises: a fault here would keep the server from starting
        logger.warning("moegate stands aside: its registration failed", exc_info=True)


def _replace_classes() -> None:
    reason = VLLM.why_not() or signatures.why_not(signatures.installed_parameters)
    if reason is not None:
        raise LeftToEngineError(reason)
    try:
        logits_dtype("bfloat16")
    except ValueError as error:
        raise LeftToEngineError(str(error)) from None
    from vllm.model_executor.custom_op import PluggableLayer, op_registry_oot

    from moegate.integrations.vllm.gate_linear import MoegateGateLinear
    from moegate.integrations.vllm.runner import MoegateRunner

    replacements = {"MoERunner": MoegateRunner, "GateLinear": MoegateGateLinear}
    for name, replacement in replacements.items():
        if op_registry_oot.get(name, replacement) is not replacement:
            raise LeftToEngineError(f"another plugin has replaced {name}")
    for name, replacement in replacements.items():
        if name not in op_registry_oot:
            PluggableLayer.register_oot(name=name)(replacement)
    # vLLM finds a compiled graph by the variables that it knows, before it traces anything. Without these entries, a
    # graph that was compiled without moegate would be taken from the cache with moegate on, and the other way around.
    envs.environment_variables["MOEGATE"] = lambda: __version__
    envs.environment_variables["MOEGATE_LOGITS"] = lambda: os.environ.get("MOEGATE_LOGITS")
