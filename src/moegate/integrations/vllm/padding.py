"""Which rows vLLM says are padding, where its own routers heed that."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import Tensor

from moegate.integrations.vllm.signatures import LAYERS

MaskOf = Callable[[int], "Tensor | None"]
"""M -> the mask [M] of the rows that are padding; None: no row is."""


def mask_of(router: Any) -> MaskOf | None:
    """The mask for the calls of this router; None: vLLM's own router routes rows of padding like others."""
    # vLLM's own function: it knows the switch VLLM_MOE_SKIP_PADDING, and older versions do not have it.
    masked = getattr(import_module(f"{LAYERS}.router.fused_topk_router"), "_get_padding_mask", None)
    is_heeded = type(router).__name__ in ("FusedTopKRouter", "FusedTopKBiasRouter") or getattr(
        router, "skip_padding", False
    )
    if masked is None or not is_heeded:
        return None

    def mask(num_tokens: int) -> Tensor | None:
        found: Tensor | None = masked(num_tokens)
        # Rows that were gathered from other ranks are not in the mask.
        return found if found is not None and len(found) == num_tokens else None

    return mask
