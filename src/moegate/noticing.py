"""What a refresh notes of a gate: the tensors, and the plan and prepared weight made for them."""

from __future__ import annotations

import os
import threading
from typing import NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moegate import arguments
from moegate.choice.dispatch import Dispatch, Options, for_route
from moegate.choice.plan import BACKEND_NAMES
from moegate.halves import Half, Prepared
from moegate.look import NAMES, Form, Given, Look, Questions, form_of, look_of, place_of, questions_about
from moegate.plain import META, are_plain
from moegate.routing import Output, RouterTensors, outputs_of
from moegate.spec import RouterSpec
from moegate.warn import warn_once

# A frozen gate with so many refreshes in calls gets a warning that it is slow.
_MANY_REFRESHES = 16
_CORRECTION = NAMES.index("e_score_correction_bias")


class Noted(NamedTuple):
    """What one refresh found and made. Immutable, so that calls in other threads see a consistent state."""

    spec: RouterSpec | None
    """None: the tensors are not final, and the next call refreshes."""
    own: Given
    """The tensors. None for the weight of a gate that is not frozen: any weight of the same form will do."""
    forms: tuple[Form | None, ...]
    places: dict[str, tuple[int, int | None]]
    """Address and version of the tensors in `own` that must not be written to unnoticed."""
    questions: Questions | None
    """Compare other tensors with these; None: wrappers, which cannot be compared."""
    buffers: frozenset[str]
    """The names of the gate's buffers."""
    holds: Look
    kept: tuple[Tensor, ...]
    """Views that keep the memory of a frozen gate's tensors allocated, so that no other tensor gets their address."""
    device: torch.device
    tensors: RouterTensors
    learned: tuple[Tensor, ...]
    """The tensors in `tensors` that training changes."""
    outputs: tuple[Output, ...]
    dispatch: Dispatch
    prepared: Prepared
    in_calls: int
    """The number of refreshes of this gate that were made because a call found changed tensors."""

    def in_doubt(self) -> Noted:
        """A copy whose look always fails, so that the next call refreshes."""
        return self._replace(holds=_never)

    def with_others_alike(
        self, spec: RouterSpec, given: Given, buffers: frozenset[str], *, frozen: bool
    ) -> Noted | None:
        """A copy for other tensors of a gate that is not frozen; None if these tensors need a refresh."""
        is_same = spec is self.spec and not frozen and not spec.hash_routing and are_plain(given)
        if not is_same or any(tensor is not None and not isinstance(tensor, Tensor) for tensor in given):
            return None
        if self.questions is None or tuple(map(form_of, given)) != self.forms:
            return None
        tensors = RouterTensors(*given[1:])
        own = (None, *tensors)
        holds = look_of(_named(own), self.questions, {}, buffers)
        return self._replace(own=own, buffers=buffers, holds=holds, tensors=tensors, learned=learned(tensors))

    def first_change(self, spec: RouterSpec, given: Given) -> str:
        """The name of the first tensor that differs from the noted one; "gate" if no tensor does."""
        if spec is self.spec:
            for name, tensor, own, form in zip(NAMES, given, self.own, self.forms, strict=True):
                is_other = (own is not None and tensor is not own) or not isinstance(tensor, Tensor | None)
                if is_other or form_of(tensor) != form:
                    return name
                if name in self.places and tensor is not None and place_of(tensor) != self.places[name]:
                    return name
        return "gate"


def _named(own: Given) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in zip(NAMES, own, strict=True) if tensor is not None}


def _never(*now: object) -> bool:
    """The look for wrappers, which cannot be compared, and for tensors that are not all loaded yet."""
    return False


def learned(tensors: RouterTensors) -> tuple[Tensor, ...]:
    """The small tensors that are a gate's parameters."""
    correction = tensors.e_score_correction_bias
    others = tensors.bias, tensors.input_scale, tensors.per_expert_scale, tensors.global_scale
    found = (*others, correction if isinstance(correction, nn.Parameter) else None)
    return tuple(tensor for tensor in found if tensor is not None)


def is_capturing(device: torch.device) -> bool:
    """True if the device's current stream is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(name: str) -> NoReturn:
    """Refuses a refresh during a capture: it would allocate, compile and wait, which a CUDA graph cannot record.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f"{name}: not what the gate last took note of, and it cannot do so while a CUDA graph is captured; "
        "call gate.refresh() before the capture"
    )


def warn_of_many_refreshes(in_calls: int) -> None:
    """Warns once that a frozen gate's tensors keep changing."""
    if in_calls == _MANY_REFRESHES:
        warn_once(
            f"{_MANY_REFRESHES} calls found the tensors of a frozen gate changed, and each made a refresh; "
            "Gate(..., frozen=False) reads them anew in each call, which is faster"
        )


def take_note(
    spec: RouterSpec,
    given: Given,
    buffers: frozenset[str],
    options: Options,
    half: Half,
    *,
    is_loaded: bool,
    in_calls: int,
) -> Noted:
    """Checks a gate's tensors as the constructor does, makes the plan, and prepares the weight of a frozen gate.

    `half`: what of a route the module computes. `is_loaded`: a hash table with wrong values is an error. Otherwise it
    may be a placeholder, and the next call takes note again. `in_calls`: see `Noted`.

    Raises:
        TypeError, ValueError: See `Gate`.
        RuntimeError: A CUDA graph is being captured.
    """
    weight, tensors = arguments.check_gate(given, spec)
    are_all_plain = are_plain(given)
    is_here = are_all_plain and not weight.is_meta
    if is_here and is_capturing(weight.device):
        refuse_in_capture("gate")
    is_final = are_all_plain and (weight.is_meta or _has_table(tensors, spec, is_loaded=is_loaded))
    dispatch = _dispatch_for(weight, are_all_plain, spec, tensors, options)
    if keeps := options.frozen and is_here:
        _fence(weight.device)
    own = (weight if keeps else None, *tensors) if are_all_plain else (None,) * len(NAMES)
    named = _named(own)
    questions = questions_about(*{"weight": weight, **named}.values()) if are_all_plain else None
    places = {name: place_of(tensor) for name, tensor in named.items() if keeps or name == "tid2eid"}
    prepared = dispatch.prepare(weight.detach(), tensors.detach(), half) if is_here else {}
    return Noted(
        spec if is_final else None,
        own,
        tuple(map(form_of, given)),
        places,
        questions,
        buffers,
        look_of(named, questions, places, buffers) if questions is not None and is_final else _never,
        tuple(tensor.detach() for tensor in named.values() if keeps),
        weight.device,
        tensors,
        learned(tensors),
        outputs_of(spec),
        dispatch,
        prepared,
        in_calls,
    )


def _fence(device: torch.device) -> None:
    """Runs a kernel after whichever wrote the weight, and before every call: a frozen gate's read it early, by PDL."""
    if device.type == "cuda":
        torch.zeros(1, device=device)  # launched without PDL


def _dispatch_for(
    weight: Tensor, are_plain: bool, spec: RouterSpec, tensors: RouterTensors, options: Options
) -> Dispatch:
    """The dispatch for a gate's calls; wrappers are routed by PyTorch's operations alone."""
    is_here = are_plain and not weight.is_meta
    if not is_here and options.backend in BACKEND_NAMES:
        # A forced backend applies once the tensors are on their device, which is not yet known here.
        options = options._replace(backend=None)
    return for_route(weight.device if are_plain else META, spec, weight, tensors, options)


def _has_table(tensors: RouterTensors, spec: RouterSpec, *, is_loaded: bool) -> bool:
    """True if there is no hash table, or its values are right; False if they are wrong and may still be loaded.

    Raises:
        ValueError: The values are wrong, and is_loaded.
    """
    if tensors.tid2eid is None:
        return True
    try:
        arguments.check_table(tensors.tid2eid, spec)
    except ValueError:
        if is_loaded:
            raise
        return False
    return True


def widened(given: Given) -> Given:
    """A gate's tensors, with a correction bias in half precision widened to float32."""
    bias = given[_CORRECTION]
    if not isinstance(bias, Tensor) or bias.dtype not in (torch.bfloat16, torch.float16):
        return given
    return (*given[:_CORRECTION], bias.detach().float(), *given[_CORRECTION + 1 :])


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # not in the gate: locks cannot be pickled


def lock_of(gate: nn.Module) -> threading.RLock:
    """The lock under which a gate takes note."""
    return _locks.setdefault(gate, threading.RLock())


if hasattr(os, "register_at_fork"):  # a lock that another thread of the parent holds is never released in the child
    os.register_at_fork(after_in_child=_locks.clear)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # compilers call it instead of tracing it
def warn_of_no_grad() -> None:
    """Warns once that no gradient flows through a routing; for compiled code, at compile time."""
    warn_once(
        "no gradient flows through a routing, neither to hidden nor to the gate's parameters, of which one requires "
        "it here: their grad stays as it is. Call the gate under torch.no_grad() if none is wanted"
    )


def requires_grad(tensors: tuple[Tensor | None, ...]) -> bool:
    """True if any of the tensors does."""
    for tensor in tensors:  # noqa: SIM110 # faster than any(), in every call with autograd
        if tensor is not None and tensor.requires_grad:
            return True
    return False
