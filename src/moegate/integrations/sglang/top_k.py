"""`TopK` with moegate in the slot that SGLang keeps for plugins, `KernelBackend.PLUGIN`."""

from __future__ import annotations

from typing import Any

import torch
from sglang.kernels.spec import KernelBackend
from sglang.srt.layers.moe.topk import TopK, select_experts
from torch import Tensor

from moegate.integrations.sglang import in_place
from moegate.integrations.sglang.report import REPORT
from moegate.integrations.sglang.selection import Selection
from moegate.integrations.takeover import LeftToEngineError


class MoegateTopK(TopK):  # type: ignore[misc]
    """SGLang's `TopK`; calls that moegate does not take run as before."""

    capabilities = {**TopK.capabilities, KernelBackend.PLUGIN: frozenset()}  # noqa: RUF012

    # Of the class, since `TopK.__init__` has a signature of its own.
    _selection: Selection | None = None
    _is_left = False

    def backend_eligible(self, backend: KernelBackend, *args: Any, **kwargs: Any) -> bool:
        """True if the backend may run this call; for the plugin's slot: if moegate takes it."""
        if backend is not KernelBackend.PLUGIN:
            return bool(super().backend_eligible(backend, *args, **kwargs))
        if torch.compiler.is_compiling():
            return False
        if self._is_left or self._selection is not None:
            REPORT.tell()  # a layer that is called again ends a pass in which others were decided on
        return self._taken(*args, **kwargs) is not None

    def forward_plugin(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        *,
        num_token_non_padded: Tensor | None = None,
        expert_location_dispatch_info: Any = None,
        **others: Any,
    ) -> Any:
        """As `TopK.forward_cuda`, with moegate's routing function in `select_experts`.

        Raises:
            NotImplementedError: moegate does not take this call. SGLang asks first, unless the plugin's backend is
                forced; then it falls back.
        """
        selection = self._taken(hidden_states, router_logits, **others)
        if selection is None:
            raise NotImplementedError("moegate does not take this call")
        num_token_non_padded, expert_location_dispatch_info = self._resolve_routing_inputs(
            num_token_non_padded, expert_location_dispatch_info
        )
        output = select_experts(
            hidden_states=hidden_states,
            layer_id=self.layer_id,
            router_logits=router_logits,
            topk_config=selection.config,
            num_token_non_padded=num_token_non_padded,
            expert_location_dispatch_info=expert_location_dispatch_info,
        )
        return self._apply_waterfill(output, hidden_states.shape[0])

    def _taken(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        *,
        dynamic_expert_bias: Tensor | None = None,
        router_logits_partials: Tensor | None = None,
        **_: Any,
    ) -> Selection | None:
        """What routes in this call; None: SGLang."""
        if self._is_left or dynamic_expert_bias is not None or router_logits_partials is not None:
            return None
        selection = self._selection
        if selection is None or not selection.is_of(self.topk_config):
            selection = self._decide(hidden_states, router_logits)
        return selection if selection is not None and selection.fits(router_logits) else None

    def _decide(self, hidden_states: Tensor, router_logits: Tensor) -> Selection | None:
        if self.topk_config.output_format is None:
            return None  # not bound to experts yet, which SGLang's own forward tells
        if router_logits.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # the first call compiles, which a CUDA graph cannot record
        in_place.check()
        before, name = self._selection, f"{'draft ' if self.is_draft else ''}layer {self.layer_id}"
        try:
            selection = Selection(self.topk_config, router_logits.shape[-1], hidden_states.shape[-1])
        except LeftToEngineError as reason:
            self._is_left, self._selection = True, None
            REPORT.note(name, str(reason))
            return None
        if before is not None:
            before.is_current = False
        self._selection = selection
        REPORT.note(name, None)
        return selection
