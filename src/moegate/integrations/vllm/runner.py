"""vLLM's `MoERunner`, which hands its routers over to moegate."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.model_executor.layers.fused_moe.runner.moe_runner_interface import MoERunnerInterface
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.platforms import current_platform

from moegate.integrations.takeover import LeftToEngineError, Takeover
from moegate.integrations.vllm.routed_layer import take_over
from moegate.integrations.vllm.weights import keep_weight
from moegate.plain import is_compiling

logger = init_logger("vllm.moegate")


class MoegateRunner(MoERunner):  # type: ignore[misc] # vLLM's classes have no types here
    """Takes the model's layers over in its first forward pass.

    Only then all is settled that the choice depends on: the kernels of the experts, LoRA, the dtype of the logits. This
    pass is the one in which vLLM measures memory, so no CUDA graph is captured yet.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._moegate_has_looked = False
        if not current_platform.is_cpu():
            return
        if type(self.gate) is ReplicatedLinear:
            keep_weight(self.gate)
        if get_current_vllm_config().compilation_config.mode != CompilationMode.NONE:
            self._moegate_has_looked = True
            logger.info_once("moegate leaves the MoE layers to vLLM: torch.compile looks into them on a CPU")

    def _forward_impl(self, *args: Any, **kwargs: Any) -> Any:
        if not self._moegate_has_looked and not is_compiling() and not _is_capturing():
            report(take_over_all(get_forward_context().no_compile_layers))
        return super()._forward_impl(*args, **kwargs)


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def take_over_all(layers: dict[str, Any]) -> Takeover:
    """Takes over what moegate can route of a model's layers, by name."""
    takeover = Takeover()
    for name, layer in layers.items():
        if type(layer) is MoegateRunner:
            layer._moegate_has_looked = True
            try:
                logger.debug("%s: moegate computes %s", name, take_over(layer))
                takeover.taken.append(name)
            except LeftToEngineError as error:
                takeover.left[name] = str(error)
        elif isinstance(layer, MoERunnerInterface):
            takeover.left[name] = f"a runner of its own, {type(layer).__name__}"
    return takeover


def report(takeover: Takeover) -> None:
    """Logs what was taken over, and each layer that was not."""
    logger.info("%s", takeover)
    for name, reason in takeover.left.items():
        logger.debug("%s: left to vLLM, %s", name, reason)
