"""The part of `Gate` that takes note of the gate's tensors, and refreshes when a call notices a change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moegate import arguments, ops
from moegate.choice import Explanation, explain, explain_half
from moegate.choice.dispatch import Options
from moegate.choice.plan import log
from moegate.gate_tensors import GateTensors, as_parameter, widen_correction_bias
from moegate.halves import Half
from moegate.look import NAMES, Given
from moegate.noticing import (
    Noted,
    is_capturing,
    lock_of,
    refuse_in_capture,
    take_note,
    warn_of_many_refreshes,
)
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec

if TYPE_CHECKING:
    from typing_extensions import Self

_OPTIONS = frozenset({"spec", "frozen", "pdl", "backend", "policy"})


class TakesNote(GateTensors):
    """A module with a gate's tensors under the names of `look.NAMES`; `_noted` is the result of the last refresh."""

    frozen: bool
    pdl: bool
    backend: str | None
    policy: str
    _noted: Noted | None
    _spec_text: str

    def __init__(
        self, spec: RouterSpec, weight: Tensor, tensors: RouterTensors, options: Options, *, half: Half = "both"
    ) -> None:
        """Of tensors that were checked; `half` is what of a route the module computes."""
        super().__init__()
        self.spec, self._half = spec, half
        self.frozen, self.pdl, self.backend, self.policy = options
        self._noted = None
        self.register_parameter("weight", as_parameter(weight))
        self._register(tensors, "bias", "input_scale", "per_expert_scale", "global_scale")
        self._register(tensors, "e_score_correction_bias", "tid2eid")
        self.register_load_state_dict_post_hook(refresh_after_load)  # type: ignore[no-untyped-call]
        if self.get_parameter("weight").device == weight.device:
            self._take_note(is_loaded=False)
        else:  # accelerate's init_empty_weights() moved the weight to meta; the real weight comes later
            self._refresh_if_fit()

    def explain(self, num_tokens: int) -> Explanation:
        """Explains the plan for M tokens.

        Args:
            num_tokens: M, 0 or more, of hidden states in the weight's dtype (bfloat16 beside a float32 weight).

        Returns:
            The kernels, the expected time with its evidence, and the reason against each other candidate. Of a
            `GateLinear` no time is expected, since whole routes are what is measured.

        Raises:
            TypeError: Not an int.
            ValueError: A negative number; or the gate's `backend` cannot route M tokens.
        """
        with lock_of(self):
            if self._noted is None or not self._holds(self._noted):
                self._take_note(is_loaded=False)
            assert self._noted is not None
            plan = self._noted.dispatch.plan
            return explain_half(plan, num_tokens, "gemm") if self._half == "gemm" else explain(plan, num_tokens)

    def refresh(self) -> None:
        """Takes note of changed tensors and checks them.

        Needed after a write that no call can notice (docs/noticing.md), and after any change before a capture.

        Raises:
            TypeError, ValueError: What the constructor and the calls raise for these tensors.
            RuntimeError: A CUDA graph is being captured.
        """
        with lock_of(self):
            self._take_note()

    def _refresh_if_fit(self) -> None:
        """A refresh that raises nothing, so that no cast or load of a model stops half way; the next call raises."""
        with contextlib.suppress(TypeError, ValueError), lock_of(self):
            self._take_note(is_loaded=False)

    def _notice(self) -> tuple[Noted, Tensor]:
        """Refreshes in a call whose look failed, once for all threads; also returns the weight."""
        with lock_of(self):
            noted, given = self._noted, self._given()
            if noted is None:
                self._take_note()
            elif not self._holds(noted):
                alike = noted.with_others_alike(self.spec, given, frozenset(self._buffers), frozen=self.frozen)
                if alike is not None:
                    assert given[0] is not None
                    self._noted = alike
                    return alike, given[0]
                if is_capturing(noted.device):
                    refuse_in_capture(noted.first_change(self.spec, given))
                in_calls = noted.in_calls + self.frozen
                warn_of_many_refreshes(in_calls)
                self._take_note(in_calls=in_calls)
            weight = self._given()[0]
            assert self._noted is not None
            assert weight is not None
            return self._noted, weight

    def _holds(self, noted: Noted) -> bool:
        return noted.holds(self._parameters, self._buffers)

    @torch.inference_mode(False)  # a prepared weight is used after the mode has ended
    @torch.no_grad()
    def _take_note(self, *, is_loaded: bool = True, in_calls: int = 0) -> None:
        """See `take_note`; the caller holds the lock."""
        arguments.check_spec(self.spec)
        widen_correction_bias(self)
        before = None if self._noted is None else self._noted.dispatch
        options = Options(self.frozen, self.pdl, self.backend, self.policy)
        buffers = frozenset(self._buffers)
        self._noted = take_note(
            self.spec, self._given(), buffers, options, self._half, is_loaded=is_loaded, in_calls=in_calls
        )
        if self._noted.dispatch is not before:
            log(self._noted.dispatch.plan)

    def _given(self) -> Given:
        # By name: torch.nn.utils.parametrize and prune replace an entry of `_parameters` by a computed attribute.
        return tuple(getattr(self, name, None) for name in NAMES)

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigns; where the look cannot notice the assignment, makes the next call refresh."""
        super().__setattr__(name, value)
        if name == "spec":
            self._spec_text = ops.spec_text(value) if isinstance(value, RouterSpec) else ""
        if name in _OPTIONS:
            self._noted = None
        else:
            self._doubt(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Registers, which counts as an assignment."""
        super().register_parameter(name, param)
        self._doubt(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Registers, which counts as an assignment."""
        super().register_buffer(name, tensor, persistent)
        self._doubt(name)

    def _doubt(self, name: str) -> None:
        """Makes the next call refresh, if its look cannot notice that `name` was assigned."""
        noted = self.__dict__.get("_noted")
        if noted is None or name not in NAMES:
            return
        if self.frozen or noted.forms[NAMES.index(name)] is None:
            # A tensor that the spec does not ask for; or FSDP2, which assigns the same tensor again after a write that
            # no version counts: its memory was freed in between, and may be at the same address.
            self._noted = noted.in_doubt()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves and casts like any module, except for casts of tensors that are pinned to float32."""
        super()._apply(fn, recurse)
        self._refresh_if_fit()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A packed weight cannot be copied, and a plan holds for one machine; the copy's first call makes both again.
        return {**self.__dict__, "_noted": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._refresh_if_fit()


def refresh_after_load(module: TakesNote, incompatible_keys: object) -> None:
    """The hook that PyTorch calls after a state dict was loaded into the module."""
    module._refresh_if_fit()
