"""One MoE layer of vLLM, routed by moegate."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ReplicatedLinear

from moegate import Gate, RouterSpec, TopK
from moegate.integrations.engines import logits_dtype
from moegate.integrations.takeover import LeftToEngineError
from moegate.integrations.vllm.adapter import Rule, rule_of
from moegate.integrations.vllm.gate_linear import MoegateGateLinear
from moegate.integrations.vllm.padding import mask_of
from moegate.integrations.vllm.platform import why_not_here
from moegate.integrations.vllm.routed_logits import RoutedLogits, plain
from moegate.integrations.vllm.weights import is_unquantized, logits_dtype_of
from moegate.plain import is_compiling
from moegate.routing import LOGITS


def take_over(runner: Any) -> str:
    """Has moegate route the layer of a runner whose weights are loaded.

    Returns:
        How, for a log.

    Raises:
        LeftToEngineError: The layer is left as it is.
    """
    try:
        return _take_over(runner)
    except (AttributeError, TypeError, ValueError) as error:  # a size that no spec has, or another vLLM
        raise LeftToEngineError(str(error)) from error


def _take_over(runner: Any) -> str:
    if (reason := why_not_here()) is not None:
        raise LeftToEngineError(reason)
    if runner.routed_experts.quant_method.is_monolithic:
        raise LeftToEngineError("experts that route themselves")
    if runner._fse_fuse_gate:
        raise LeftToEngineError("a gate that is joined with that of the shared expert")
    config = runner.moe_config
    rule = rule_of(runner.router, config.num_logical_experts)
    spec = RouterSpec(
        config.hidden_dim,
        config.num_logical_experts,
        runner.router.top_k,
        topk_ids_dtype="int64" if runner._quant_method.topk_indices_dtype == torch.int64 else "int32",
        **rule.fields,
    )
    apart = _why_apart(runner)
    if apart is None:
        _Fused(runner, spec, rule).install()
        return "gate and selection"
    if config.in_dtype == torch.float16:
        raise LeftToEngineError("float16 logits")
    _Selection(runner, spec, rule).install()
    return f"selection alone: {apart}"


def _why_apart(runner: Any) -> str | None:
    """Why the gate is not computed together with the selection; None: it is."""
    gate = runner.gate
    if gate is None:
        return "the model calls the gate itself"
    if hasattr(gate, "base_layer"):
        raise LeftToEngineError("a gate with LoRA")
    if type(gate) not in (MoegateGateLinear, ReplicatedLinear):
        return f"the gate is a {type(gate).__name__}"
    if not is_unquantized(gate):
        raise LeftToEngineError("quantised gate")
    if logits_dtype_of(gate) not in LOGITS:
        raise LeftToEngineError(f"{str(logits_dtype_of(gate)).removeprefix('torch.')} logits")
    if gate.skip_bias_add and gate.bias is not None:
        return "the gate's bias is added later"
    gathers = runner.moe_config.pcp_size > 1 and not runner.moe_config.moe_parallel_config.use_all2all_kernels
    if runner.do_naive_dispatch_combine or gathers:
        return "the logits of all ranks are gathered"
    return None


class _RoutedLayer:
    """Stands in for the `_compute_routing` of a router.

    What comes out are logical ids, as from vLLM's own method: its capture of ids, its map to physical experts (EPLB)
    and its dispatch follow after it.
    """

    def __init__(self, runner: Any, rule: Rule) -> None:
        self.runner, self.rule = runner, rule
        self.mask = mask_of(runner.router)
        self.engine_routing = runner.router._compute_routing

    def install(self) -> None:
        """Takes the layer over."""
        self.runner.router._compute_routing = self.compute_routing

    def padding(self, num_tokens: int) -> Tensor | None:
        """The rows that are no token's, if vLLM's own router leaves them out."""
        return None if self.mask is None else self.mask(num_tokens)

    def padding_dtypes(self) -> tuple[torch.dtype | None, ...]:
        """The forms of `padding` that calls bring, to be compiled ahead."""
        return (None,) if self.mask is None else (None, torch.bool)

    def hold_bias(self, module: nn.Module) -> None:
        """Puts the router's own tensor in the place of the alias that a constructor made.

        Offloading gives a parameter other memory, which an alias does not follow.
        """
        if self.rule.correction_bias is not None:
            module.e_score_correction_bias = self.rule.correction_bias

    def compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None, *, input_ids: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The weights and ids of M tokens; an id's dtype that vLLM changed since is cast by vLLM."""
        raise NotImplementedError


class _Fused(_RoutedLayer):
    """Computes logits and routing where the runner calls its gate."""

    def __init__(self, runner: Any, spec: RouterSpec, rule: Rule) -> None:
        super().__init__(runner, rule)
        linear = runner.gate
        self.linear, self.engine_gate = linear, linear.forward
        dtype = str(logits_dtype_of(linear)).removeprefix("torch.")
        spec = replace(spec, linear_bias=linear.bias is not None, logits_dtype=logits_dtype(dtype))  # type: ignore[arg-type]
        # Not frozen, so that each call reads the tensors themselves: whatever writes to them takes effect without a
        # refresh, be it a reload, an update in reinforcement learning or sleep mode.
        self.gate = Gate(
            spec, linear.weight, bias=linear.bias, e_score_correction_bias=rule.correction_bias, frozen=False
        )
        self.hold_bias(self.gate)
        for padding in self.padding_dtypes():
            self.gate.warmup(runner.moe_config.in_dtype, padding=padding)

    def install(self) -> None:
        """Takes the layer over."""
        super().install()
        self.linear.forward = self.forward

    def forward(self, x: Tensor) -> Any:
        """Stands in for the gate's `forward`."""
        if is_compiling() or x.dim() != 2:
            return self.engine_gate(x)
        if self.gate.weight is not self.linear.weight:  # vLLM's reload and its offloading may assign another one
            self.gate.weight = self.linear.weight
        routing = self.gate(x, padding=self.padding(x.shape[0]), return_logits=True)
        logits = RoutedLogits.of(routing)
        return (logits, None) if self.linear.return_bias else logits

    def compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None, *, input_ids: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The routing that came with the logits; of other logits, vLLM's."""
        routing = router_logits.routing if isinstance(router_logits, RoutedLogits) else None
        if routing is None:
            return self.engine_routing(hidden_states, plain(router_logits), indices_type, input_ids=input_ids)  # type: ignore[no-any-return]
        return routing.topk_weights, routing.topk_ids


class _Selection(_RoutedLayer):
    """Selects from logits that somebody else computed."""

    def __init__(self, runner: Any, spec: RouterSpec, rule: Rule) -> None:
        super().__init__(runner, rule)
        self.top_k = TopK(spec, e_score_correction_bias=rule.correction_bias)
        self.hold_bias(self.top_k)

    def compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None, *, input_ids: Any = None
    ) -> tuple[Tensor, Tensor]:
        """The selection of moegate, where it takes these logits."""
        spec = self.top_k.spec
        if is_compiling() or router_logits.dtype not in LOGITS or router_logits.shape[-1] != spec.num_experts:
            return self.engine_routing(hidden_states, router_logits, indices_type, input_ids=input_ids)  # type: ignore[no-any-return]
        routing = self.top_k(router_logits, padding=self.padding(router_logits.shape[0]))
        return routing.topk_weights, routing.topk_ids
