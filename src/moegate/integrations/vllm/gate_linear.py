"""vLLM's `GateLinear` with moegate's kernels, for gates that the model calls itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.layers.fused_moe.router.gate_linear import GateLinear

import moegate
from moegate.integrations.vllm.platform import why_not_here
from moegate.integrations.vllm.weights import is_unquantized, keep_weight, logits_dtype_of
from moegate.routing import LOGITS
from moegate.spec import MAX_GATE_ROWS


class MoegateGateLinear(GateLinear):  # type: ignore[misc] # vLLM's classes have no types here
    """Computes the logits by one operator, in which torch.compile does not look.

    Where the runner holds the gate, the runner's layer computes logits and routing at once instead of this class.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._moegate_computes = (
            why_not_here() is None
            and is_unquantized(self)
            and self.output_size <= MAX_GATE_ROWS
            and not (self.skip_bias_add and self.bias is not None)
        )
        if self._moegate_computes:
            keep_weight(self)

    def forward(self, x: Tensor) -> Any:
        """The logits of M tokens, in the dtype that vLLM's gate gives them."""
        # Asked in each call: the model may set out_dtype after construction.
        out_dtype = logits_dtype_of(self)
        if not self._moegate_computes or x.dim() != 2 or out_dtype not in LOGITS:
            return super().forward(x)
        logits = moegate.router_gemm(x, self.weight, self.bias, out_dtype=out_dtype)
        return (logits, None) if self.return_bias else logits
