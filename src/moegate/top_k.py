"""`TopK`: the selection of a router with its tensors, as a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moegate import arguments, ops
from moegate.choice import Explanation, explain_half
from moegate.choice.dispatch import Dispatch, Options, for_selection
from moegate.choice.plan import check_names
from moegate.gate_tensors import GateTensors, given_correction_bias
from moegate.look import form_of
from moegate.noticing import learned, requires_grad, warn_of_no_grad, widened
from moegate.plain import META, are_plain, is_compiling
from moegate.routing import RouterTensors, Routing, outputs_of
from moegate.spec import RouterSpec


class TopK(GateTensors):
    """The selection of one layer's router: logits to experts and weights, by the kernels of `moegate.select`.

    For engines whose gate and selection are apart. A `Gate` computes both at once, and faster.

    The module holds the given tensors themselves, not copies, under the names of checkpoints, and prepares nothing from
    their values: each change takes effect in the next call. The correction bias stays in float32 whatever dtype the
    module is cast to.

    Args:
        spec: What the router computes. Each tensor below must be given if, and only if, the spec asks for it.
        e_score_correction_bias: [num_experts + num_zero_experts]; half precision is widened to float32.
        per_expert_scale: [num_experts] bfloat16, float16 or float32.
        global_scale: [1] bfloat16, float16 or float32.
        tid2eid: [vocabulary, top_k] int32 or int64, the experts of each token id, distinct in a row.
        pdl: See `Gate`.
        backend: See `Gate`.
        policy: See `Gate`.

    Raises:
        TypeError: Not a tensor, or a dtype that is not allowed.
        ValueError: A shape, stride or device that is not allowed, a tensor that the spec does not ask for or one
            missing; an unknown backend or policy.
    """

    e_score_correction_bias: Tensor | None
    per_expert_scale: nn.Parameter | None
    global_scale: nn.Parameter | None
    tid2eid: Tensor | None

    def __init__(
        self,
        spec: RouterSpec,
        *,
        e_score_correction_bias: Tensor | None = None,
        per_expert_scale: Tensor | None = None,
        global_scale: Tensor | None = None,
        tid2eid: Tensor | None = None,
        pdl: bool = True,
        backend: str | None = None,
        policy: str = "measured",
    ) -> None:
        arguments.check_spec(spec)
        check_names(policy, backend)
        correction_bias = given_correction_bias(e_score_correction_bias)
        tensors = RouterTensors(None, correction_bias, None, per_expert_scale, global_scale, tid2eid)
        first = next((tensor for tensor in tensors if isinstance(tensor, Tensor)), None)
        arguments.check_tensors(spec, tensors, None if first is None else first.device, gemm=False)
        super().__init__()
        self.spec, self.pdl, self.backend, self.policy = spec, pdl, backend, policy
        self._register(tensors, "e_score_correction_bias", "per_expert_scale", "global_scale", "tid2eid")
        self._found: tuple[Any, Dispatch] | None = None

    def forward(
        self,
        logits: Tensor,
        *,
        input_ids: Tensor | None = None,
        padding: Tensor | None = None,
        out: Routing | None = None,
    ) -> Routing:
        """The experts of M tokens and their weights.

        Args:
            logits: [M, R] float32 or bfloat16, taken as they are, whatever `spec.logits_dtype`;
                R = `spec.num_gate_rows`, M may be 0.
            input_ids: [M] int32 or int64, the token ids, for hash routing only.
            padding: See `Gate.forward`.
            out: Contiguous tensors to fill and return, such as the routing of an earlier call with M tokens.

        Returns:
            A `Routing` without logits. No gradient flows through it.

        Raises:
            TypeError: Not a tensor, or a dtype that is not allowed.
            ValueError: A wrong shape, stride or device; on a CPU, a token id outside the hash table.
        """
        spec = self.spec
        arguments.check_logits(logits, spec)
        tensors = self._tensors()
        if is_compiling():
            dispatch = None
            arguments.check_tensors(spec, tensors, logits.device, gemm=False)
        else:
            dispatch = self._dispatch(logits, tensors, are_plain((logits, *tensors, input_ids, padding)))
        arguments.check_rows(input_ids, padding, spec, tensors, logits.shape[0], logits.device)
        if out is not None:
            arguments.check_out(out, outputs_of(spec), spec, logits.shape[0], logits.device)
        if torch.is_grad_enabled() and requires_grad((logits, *learned(tensors))):
            warn_of_no_grad()
        if dispatch is None:
            selected = ops.select(logits.detach(), spec, tensors.detach(), input_ids, padding, self._options())
            return selected.into(out).without_logits()
        with torch.no_grad():
            return dispatch.select(logits, tensors, input_ids, padding, out).without_logits()

    def _dispatch(self, logits: Tensor, tensors: RouterTensors, is_plain: bool) -> Dispatch:
        """What runs; the tensors are checked if their forms have changed."""
        known = (self.spec, self._options(), is_plain, logits.dtype, logits.device, *map(form_of, tensors))
        found = self._found  # once: another thread may replace it
        if found is None or found[0] != known:
            arguments.check_tensors(self.spec, tensors, logits.device, gemm=False)
            place, options = (logits.device, self._options()) if is_plain else (META, Options())
            self._found = found = known, for_selection(place, self.spec, logits.dtype, tensors, options)
        return found[1]

    def _tensors(self) -> RouterTensors:
        """By name; a correction bias that was assigned in half precision is widened."""
        given = (getattr(self, name, None) for name in RouterTensors._fields)
        return RouterTensors(*widened((None, *given))[1:])

    def _options(self) -> Options:
        return Options(False, self.pdl, self.backend, self.policy)

    def warmup(
        self, *logits_dtypes: torch.dtype, device: torch.device | str, padding: torch.dtype | None = None
    ) -> None:
        """Selects for one token in each of these dtypes of `logits`, so that later calls compile nothing.

        Args:
            logits_dtypes: float32 or bfloat16.
            device: Of the logits.
            padding: The dtype of the `padding` that the calls bring, bool or int32; None: they bring none.

        Raises:
            TypeError: Another dtype.
            ValueError: A device where the module's tensors are not.
        """
        ids = torch.zeros(1, dtype=torch.int64, device=device) if self.spec.hash_routing else None
        rows = None if padding is None else torch.zeros(1, dtype=padding, device=device)
        for logits_dtype in logits_dtypes:
            logits = torch.zeros((1, self.spec.num_gate_rows), dtype=logits_dtype, device=device)
            self(logits, input_ids=ids, padding=rows)

    def explain(self, num_tokens: int) -> Explanation:
        """Explains the plan for M tokens, for logits like those of the last call.

        Args:
            num_tokens: M, 0 or more.

        Returns:
            The kernel, and the reason against each other candidate. No time is expected, since whole routes are what is
            measured.

        Raises:
            TypeError: Not an int.
            ValueError: A negative number; or the module's `backend` cannot select for M tokens.
            RuntimeError: Nothing was selected yet, so that the device is not known.
        """
        if self._found is None:
            raise RuntimeError("explain: nothing was selected yet, so that the device is not known; warmup() first")
        return explain_half(self._found[1].plan, num_tokens, "selection")

    def __getstate__(self) -> dict[str, Any]:
        # A plan holds for one machine; the copy's first call makes another.
        return {**self.__dict__, "_found": None}

    def extra_repr(self) -> str:
        """The module's spec and backend in one line."""
        spec = self.spec
        backend = None if self._found is None else self._found[1].name
        return f"num_experts={spec.num_experts}, top_k={spec.top_k}, scoring_func={spec.scoring_func!r}, {backend=}"
