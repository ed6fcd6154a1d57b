"""How a gate's weight gets through vLLM's loading."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

import moegate
from moegate.routing import LOGITS


class GateMethod(UnquantizedLinearMethod):  # type: ignore[misc] # vLLM's classes have no types here
    """vLLM's method for a gate that is not quantized; the gate keeps its weight, and its kernels are compiled.

    On a CPU, vLLM packs the weight and then empties the parameter, which moegate reads.
    """

    def process_weights_after_loading(self, layer: Any) -> None:
        """What vLLM calls after each load, the first one and each reload."""
        weight = layer.weight
        super().process_weights_after_loading(layer)
        layer.weight = weight
        out_dtype = logits_dtype_of(layer)
        if weight.is_cuda and out_dtype in LOGITS:
            # The first call compiles, which would be too late in the capture of a CUDA graph. A float32 weight meets
            # hidden states in either dtype.
            for hidden_dtype in {weight.dtype, torch.bfloat16}:
                hidden = torch.zeros((1, weight.shape[1]), dtype=hidden_dtype, device=weight.device)
                moegate.router_gemm(hidden, weight, layer.bias, out_dtype=out_dtype)


def is_unquantized(linear: Any) -> bool:
    """True if the layer multiplies by its parameter `weight` as it is."""
    return type(linear.quant_method) in (UnquantizedLinearMethod, GateMethod)


def keep_weight(linear: Any) -> None:
    """Has a gate that is not quantized keep its weight; called before vLLM loads it."""
    if type(linear.quant_method) is UnquantizedLinearMethod:
        linear.quant_method = GateMethod()


def logits_dtype_of(linear: Any) -> torch.dtype:
    """The dtype of the logits that vLLM's gate returns."""
    out_dtype: torch.dtype | None = getattr(linear, "out_dtype", None)  # a ReplicatedLinear has none
    weight_dtype: torch.dtype = linear.weight.dtype
    return weight_dtype if out_dtype is None else out_dtype
