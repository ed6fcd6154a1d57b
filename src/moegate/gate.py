"""`Gate`: a router with its tensors, as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moegate import arguments, ops
from moegate.choice.dispatch import Options, for_route
from moegate.choice.plan import check_names
from moegate.from_checkpoint import FromCheckpoint
from moegate.gate_tensors import given_correction_bias
from moegate.noticing import (
    learned,
    requires_grad,
    warn_of_no_grad,
    widened,
)
from moegate.plain import META, are_plain, is_compiling, is_taken_over
from moegate.routing import RouterTensors, Routing, outputs_of
from moegate.spec import RouterSpec
from moegate.takes_note import TakesNote
from moegate.warn import warn_once


class Gate(FromCheckpoint, TakesNote):
    """The router of one layer.

    Parameters and buffers have the names of checkpoints: `weight`, `bias`, `e_score_correction_bias`,
    `per_expert_scale`, `global_scale`, `tid2eid` (and `input_scale`, Gemma-4's `scale`). Tensors that the spec does not
    ask for are None. The correction bias, and a weight that the spec pins to float32, stay in float32 whatever dtype
    the module is cast to.

    The gate holds the given tensors themselves, not copies: updates in place take effect. With `frozen=True` the gate
    also keeps what it prepared from them (on a CPU, a packed weight).

    Each call checks whether the tensors changed. A tensor that was assigned, loaded, moved, pruned or swapped takes
    effect in the next call; a tensor that does not fit raises the constructor's error. A frozen gate also notices
    writes in place, by the tensors' version counters, and refreshes. Writes that PyTorch does not count go unnoticed:
    through `.data`, to an inference tensor, by a collective or a fused optimizer, through an alias (docs/noticing.md).
    After such a write, a frozen gate and a gate with a hash table need a call of `refresh()`. So do a gate that changed
    before its calls are captured into a CUDA graph, and a changed frozen gate on a GPU in code of `torch.compile`.

    Args:
        spec: What the router computes. Each tensor below must be given if, and only if, the spec asks for it.
        weight: [R, K] bfloat16, float16 or float32 (only float32 if the spec pins it), with the rows
            of the experts, the zero experts and the shared gates in this order.
        bias: [R], the linear bias; bfloat16, float16 or float32, as all tensors below without a stated dtype.
        e_score_correction_bias: [num_experts + num_zero_experts]; half precision is widened to float32.
        input_scale: [K], of the input norm.
        per_expert_scale: [num_experts].
        global_scale: [1].
        tid2eid: [vocabulary, top_k] int32 or int64, the experts of each token id, distinct in a row. The values are
            checked at the first call, so that a placeholder can be given.
        frozen: The tensors seldom change, and never while a call reads them.
        pdl: On a GPU, kernels start before the kernel in front ends (PDL, programmatic dependent launch), and wait for
            its end just before they read `hidden`. False: kernels start after the kernel in front has ended.
        backend: "torch", "cuda" or "flashinfer": only this backend runs. FlashInfer's kernels do not keep all of
            docs/contract.md. None: the policy chooses.
        policy: "measured": the fastest kernels that keep the contract, by measured times. "sglang": SGLang's
            rule of April 2026 (docs/choice.md).

    Raises:
        TypeError: Not a tensor, or a dtype that is not allowed.
        ValueError: A shape, stride or device that is not allowed, a tensor that the spec does not ask
            for or one missing; an unknown backend or policy, or a backend that cannot run here.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    input_scale: nn.Parameter | None
    per_expert_scale: nn.Parameter | None
    global_scale: nn.Parameter | None
    e_score_correction_bias: Tensor | None
    tid2eid: Tensor | None

    def __init__(
        self,
        spec: RouterSpec,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        e_score_correction_bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        per_expert_scale: Tensor | None = None,
        global_scale: Tensor | None = None,
        tid2eid: Tensor | None = None,
        frozen: bool = False,
        pdl: bool = True,
        backend: str | None = None,
        policy: str = "measured",
    ) -> None:
        arguments.check_spec(spec)
        check_names(policy, backend)  # before caches, which raise for what cannot be hashed
        weight = arguments.check_weight(weight, spec)
        e_score_correction_bias = given_correction_bias(e_score_correction_bias)
        tensors = RouterTensors(bias, e_score_correction_bias, input_scale, per_expert_scale, global_scale, tid2eid)
        arguments.check_tensors(spec, tensors, weight.device)
        super().__init__(spec, weight, tensors, Options(frozen, pdl, backend, policy))

    def forward(
        self,
        hidden: Tensor,
        *,
        input_ids: Tensor | None = None,
        padding: Tensor | None = None,
        return_logits: bool = False,
        out: Routing | None = None,
    ) -> Routing:
        """Routes M tokens.

        Args:
            hidden: [M, K] bfloat16, float16 or float32, on the gate's device; M may be 0.
            input_ids: [M] int32 or int64, the token ids, for hash routing only.
            padding: The rows that are no token's: a mask [M] bool, or how many rows in front are a token's, [1] or []
                int32. Rows of padding get id -1 and weight 0. The values are read on the device, when the kernels run.
            return_logits: Also return the logits [M, R] in the spec's `logits_dtype`.
            out: Contiguous tensors to fill and return, such as the routing of an earlier call with M tokens. If it has
                logits, a call of the `cuda` backend with up to 64 tokens allocates nothing.

        Returns:
            A `Routing`. No gradient flows through it.

        Raises:
            TypeError: Not a tensor, or a dtype that is not allowed.
            ValueError: A wrong shape, stride, device or hash table; on a CPU, a token id outside the hash table.
            RuntimeError: Tensors of the gate changed, and a CUDA graph is being captured.
        """
        if is_compiling() or (
            (type(hidden) is not Tensor or input_ids is not None or padding is not None or is_taken_over())
            and not are_plain((hidden, input_ids, padding))
        ):
            return self._unlooked(hidden, input_ids, padding, out, return_logits=return_logits)
        spec, noted, parameters = self.spec, self._noted, self._parameters
        weight: Tensor = parameters.get("weight")  # type: ignore[assignment] # if there is none, the look fails
        if noted is None or not noted.holds(parameters, self._buffers):
            noted, weight = self._notice()
        arguments.check_hidden(hidden, spec, noted.device)
        if input_ids is not None or padding is not None or spec.hash_routing:
            arguments.check_rows(input_ids, padding, spec, noted.tensors, hidden.shape[0], noted.device)
        if out is not None:
            arguments.check_out(out, noted.outputs, spec, hidden.shape[0], noted.device)
        if (had_grad := torch.is_grad_enabled()) and (requires_grad((hidden, weight)) or requires_grad(noted.learned)):
            warn_of_no_grad()
        try:
            torch._C._set_grad_enabled(False)  # what torch.no_grad() does, in a tenth of the time
            routing = noted.dispatch.route(hidden, weight, noted.tensors, input_ids, noted.prepared, out, padding)
        finally:
            torch._C._set_grad_enabled(had_grad)
        return routing if return_logits else routing.without_logits()

    def _unlooked(
        self,
        hidden: Tensor,
        input_ids: Tensor | None,
        padding: Tensor | None,
        out: Routing | None,
        *,
        return_logits: bool,
    ) -> Routing:
        """A call without a look: one operator for compilers; PyTorch's operations for wrappers, modes and tracers."""
        spec = self.spec
        weight, tensors = arguments.check_gate(widened(self._given()), spec)
        arguments.check_hidden(hidden, spec, weight.device)
        arguments.check_rows(input_ids, padding, spec, tensors, hidden.shape[0], weight.device)
        if out is not None:
            arguments.check_out(out, outputs_of(spec), spec, hidden.shape[0], weight.device)
        if torch.is_grad_enabled() and requires_grad((hidden, weight, *learned(tensors))):
            warn_of_no_grad()
        if is_compiling():
            routing = ops.route(
                hidden.detach(),
                weight.detach(),
                spec,
                tensors.detach(),
                input_ids,
                padding,
                Options(self.frozen, self.pdl, self.backend, self.policy),
                text=self._spec_text,
            ).into(out)
            return routing if return_logits else routing.without_logits()
        if weight.is_cuda and not is_taken_over():
            warn_once(f"a {type(hidden).__name__} is routed by PyTorch's operations, which are many times slower")
        with torch.no_grad():
            dispatch = for_route(META, spec, weight, tensors, Options())
            routing = dispatch.route(hidden, weight, tensors, input_ids, {}, out, padding)
        return routing if return_logits else routing.without_logits()

    def warmup(self, *hidden_dtypes: torch.dtype, padding: torch.dtype | None = None) -> None:
        """Routes one token in each of these dtypes of `hidden`, so that later calls compile nothing.

        Args:
            hidden_dtypes: bfloat16, float16 or float32.
            padding: The dtype of the `padding` that the calls bring, bool or int32; None: they bring none.

        Raises:
            TypeError: Another dtype.
        """
        weight = self.weight
        ids = torch.zeros(1, dtype=torch.int64, device=weight.device) if self.spec.hash_routing else None
        rows = None if padding is None else torch.zeros(1, dtype=padding, device=weight.device)
        for hidden_dtype in hidden_dtypes:
            hidden = torch.zeros((1, self.spec.hidden_size), dtype=hidden_dtype, device=weight.device)
            self(hidden, input_ids=ids, padding=rows)

    def extra_repr(self) -> str:
        """The gate's spec and options in one line."""
        spec = self.spec
        size = f"hidden_size={spec.hidden_size}, num_experts={spec.num_experts}, top_k={spec.top_k}"
        backend = None if self._noted is None else self._noted.dispatch.name
        return f"{size}, scoring_func={spec.scoring_func!r}, backend={backend!r}, frozen={self.frozen}"
