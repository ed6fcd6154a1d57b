"""The selection of a `TopK`, as a routing function that SGLang's own `select_experts` calls.

So what SGLang does after a selection stays SGLang's: the capture of ids, the map of EPLB, the rows of padding, the
slots of shared experts, the simulated routings and the recorder.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.moe.topk import fused_shared_expert_weight
from torch import Tensor
from torch.nn import functional as F

from moegate import TopK
from moegate.integrations.sglang.adapter import spec_of
from moegate.integrations.sglang.tickets import take
from moegate.routing import LOGITS


class Selection:
    """What routes for one `TopK`.

    Args:
        config: Its `TopKConfig`.
        num_experts: The columns of its logits.
        hidden_size: K.

    Raises:
        LeftToEngineError: SGLang goes on to route.
    """

    def __init__(self, config: Any, num_experts: int, hidden_size: int) -> None:
        self.spec = spec_of(config, num_experts, hidden_size)
        self.bias: Tensor | None = config.correction_bias
        self.is_current = True
        """False: the `TopK` has another by now."""
        self.config = _Config(config, self.route)
        """For `select_experts`."""
        self._given = config
        self._address = _address(self.bias)
        # SGLang's grouped_topk without a bias rounds the scores to the dtype of the logits.
        rounds = config.use_grouped_topk and self.bias is None
        self._dtypes = (torch.float32,) if rounds else LOGITS
        with torch.inference_mode(False):
            self._top_k = TopK(self.spec, e_score_correction_bias=self.bias)

    def is_of(self, config: Any) -> bool:
        """True if the bias is still at the address that the selection reads, which the selection keeps allocated."""
        return config is self._given and _address(config.correction_bias) == self._address

    def fits(self, logits: Tensor) -> bool:
        """True for logits that moegate selects by."""
        return (
            logits.dim() == 2
            and logits.shape[1] == self.spec.num_experts
            and logits.stride(1) == 1
            and logits.dtype in self._dtypes
            and logits.device.type in ("cuda", "cpu")
        )

    def route(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """A `custom_routing_function` of SGLang: weights and ids, [M, topk]."""
        ticket = take(gating_output)
        if ticket is not None and ticket.selection is self and ticket.routing is not None:
            ids, weights = ticket.routing.topk_ids, ticket.routing.topk_weights
        else:
            if ticket is not None:
                ticket.gate.serve(self)
            ids, weights, *_ = self._top_k(gating_output)
        if topk > self.spec.top_k:
            ids, weights = self._with_shared_expert(ids, weights)
        return weights, ids

    def _with_shared_expert(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """With the column of the shared expert, as SGLang appends it to FlashInfer's selection."""
        weight = fused_shared_expert_weight(
            routed_scaling_factor=self._given.routed_scaling_factor,
            fused_in_topk=self._given.apply_routed_scaling_factor_on_output,
        )
        return F.pad(ids, (0, 1), value=self.spec.num_experts), F.pad(weights, (0, 1), value=weight)


class _Config:
    """A `TopKConfig`, seen through: as it is at each moment, but with moegate's routing function."""

    use_grouped_topk = False

    def __init__(self, config: Any, route: Any) -> None:
        self._config, self.custom_routing_function = config, route

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)

    @property
    def routed_scaling_factor(self) -> float | None:
        """None where the weights have it already: SGLang would multiply it in after a custom routing function."""
        config = self._config
        factor: float | None = config.routed_scaling_factor
        return None if config.apply_routed_scaling_factor_on_output else factor


def _address(bias: Tensor | None) -> int | None:
    return None if bias is None else bias.data_ptr()
