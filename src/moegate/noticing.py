"""What a gate takes note of: its tensors, and what was made of them."""

from __future__ import annotations

import os
import threading
from typing import Any, NamedTuple, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moegate import arguments
from moegate.choice.dispatch import Dispatch, Options, for_route
from moegate.choice.plan import BACKEND_NAMES
from moegate.halves import Prepared
from moegate.look import NAMES, Form, Given, Look, Questions, form_of, look_of, place_of, questions_about
from moegate.plain import META, are_plain
from moegate.routing import Output, RouterTensors, outputs_of
from moegate.spec import RouterSpec
from moegate.warn import warn_once

# Refreshes in calls, after which a frozen gate is called slow.
_MANY_REFRESHES = 16
_CORRECTION = NAMES.index("e_score_correction_bias")


class Noted(NamedTuple):
    """What one refresh found and made; never changed, so that a call in another thread has all of it or none."""

    spec: RouterSpec | None
    """None: nothing to rely on, so that the next call refreshes."""
    own: Given
    """The tensors; None for the weight of a gate that is not frozen, which may be any that is alike."""
    forms: tuple[Form | None, ...]
    places: dict[str, tuple[int, int | None]]
    """Address and version of those of `own` of which they count."""
    questions: Questions | None
    """Whether other tensors are like these; None: wrappers, of which nothing can be told."""
    buffers: frozenset[str]
    """The names of the gate's buffers."""
    holds: Look
    kept: tuple[Tensor, ...]
    """Views of a frozen gate's tensors, which keep their memory: no other tensor comes to lie in the same place."""
    device: torch.device
    tensors: RouterTensors
    learned: tuple[Tensor, ...]
    """Those among them that training would change."""
    outputs: tuple[Output, ...]
    dispatch: Dispatch
    prepared: Prepared
    in_calls: int
    """How many refreshes of this gate were made because a call found other tensors."""

    def in_doubt(self) -> Noted:
        """The same, which the next call takes for changed."""
        return self._replace(holds=_never)

    def with_others_alike(
        self, spec: RouterSpec, given: Given, buffers: frozenset[str], *, frozen: bool
    ) -> Noted | None:
        """The same for other tensors of a gate that is not frozen, if a refresh would make nothing new of them."""
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
        """The name of what is not as it was noted; "gate", if it is not one of the tensors."""
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
    """The look at wrappers, of which nothing can be told, and at what is not all loaded yet."""
    return False


def learned(tensors: RouterTensors) -> tuple[Tensor, ...]:
    """The small tensors that are a gate's parameters."""
    correction = tensors.e_score_correction_bias
    others = tensors.bias, tensors.input_scale, tensors.per_expert_scale, tensors.global_scale
    found = (*others, correction if isinstance(correction, nn.Parameter) else None)
    return tuple(tensor for tensor in found if tensor is not None)


def is_capturing(device: torch.device) -> bool:
    """True if what is enqueued on the device goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def refuse_in_capture(name: str) -> NoReturn:
    """A refresh allocates, compiles and waits, none of which a CUDA graph can hold.

    Raises:
        RuntimeError: Always.
    """
    raise RuntimeError(
        f"{name}: not what the gate last took note of, and it cannot do so while a CUDA graph is captured; "
        "call gate.refresh() before the capture"
    )


def warn_of_many_refreshes(in_calls: int) -> None:
    """Says once that a gate is frozen in name only."""
    if in_calls == _MANY_REFRESHES:
        warn_once(
            f"{_MANY_REFRESHES} calls found the tensors of a frozen gate changed, and each made a refresh; "
            "Gate(..., frozen=False) reads them anew in each call, which is faster"
        )


def take_note(
    spec: RouterSpec, given: Given, buffers: frozenset[str], options: Options, *, is_loaded: bool, in_calls: int
) -> Noted:
    """Checks a gate's tensors as at first, plans for them, and prepares what pays to be made once.

    `is_loaded`: What stands in a hash table must be right. Else a wrong one, which may be a placeholder, is left to
    the next call, which takes note again. `in_calls` is of `Noted`.

    Raises:
        TypeError: See `Gate`.
        ValueError: See `Gate`.
        RuntimeError: A CUDA graph is being captured.
    """
    weight, tensors = arguments.check_gate(given, spec)
    are_all_plain = are_plain(given)
    is_here = are_all_plain and not weight.is_meta
    if is_here and is_capturing(weight.device):
        refuse_in_capture("gate")
    is_final = are_all_plain and (weight.is_meta or _has_table(tensors, spec, is_loaded=is_loaded))
    dispatch = _dispatch_for(weight, are_all_plain, spec, tensors, options)
    keeps = options.frozen and is_here
    if keeps and weight.is_cuda:
        # A frozen gate's kernels read the weight before griddepcontrol.wait. This kernel is launched without PDL: a
        # fence in the stream, behind whichever kernel wrote the weight and before every call.
        torch.zeros(1, device=weight.device)
    own = (weight if keeps else None, *tensors) if are_all_plain else (None,) * len(NAMES)
    named = _named(own)
    questions = questions_about(*{"weight": weight, **named}.values()) if are_all_plain else None
    places = {name: place_of(tensor) for name, tensor in named.items() if keeps or name == "tid2eid"}
    prepared = dispatch.prepare(weight.detach()) if is_here else {}
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


def _dispatch_for(
    weight: Tensor, are_plain: bool, spec: RouterSpec, tensors: RouterTensors, options: Options
) -> Dispatch:
    """What runs calls with a weight; wrappers are taken by PyTorch's operations alone."""
    is_here = are_plain and not weight.is_meta
    if not is_here and options.backend in BACKEND_NAMES:
        # Where the tensors are not yet, a backend that runs where they will be is not asked for.
        options = options._replace(backend=None)
    return for_route(weight.device if are_plain else META, spec, weight, tensors, options)


def _has_table(tensors: RouterTensors, spec: RouterSpec, *, is_loaded: bool) -> bool:
    """True if what stands in the hash table is right, or there is none; False if it may still be loaded.

    Raises:
        ValueError: It is wrong, and is_loaded.
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
    """A gate's tensors with a correction bias in half precision in float32."""
    bias = given[_CORRECTION]
    if not isinstance(bias, Tensor) or bias.dtype not in (torch.bfloat16, torch.float16):
        return given
    return (*given[:_CORRECTION], bias.detach().float(), *given[_CORRECTION + 1 :])


def widen_correction_bias(gate: nn.Module) -> None:
    """Puts a float32 copy in the place of a gate's correction bias in half precision."""
    name = "e_score_correction_bias"
    bias = getattr(gate, name, None)
    if not isinstance(bias, Tensor) or bias.dtype not in (torch.bfloat16, torch.float16):
        return
    wide: Tensor = bias.detach().float()
    if isinstance(bias, nn.Parameter):
        wide = nn.Parameter(wide, requires_grad=bias.requires_grad)
    holders: tuple[dict[str, Any], ...] = (gate._parameters, gate._buffers, gate.__dict__)
    for holder in holders:
        if name in holder:
            holder[name] = wide


_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()  # a lock can be neither copied nor pickled


def lock_of(gate: nn.Module) -> threading.RLock:
    """The lock under which a gate takes note."""
    return _locks.setdefault(gate, threading.RLock())


if hasattr(os, "register_at_fork"):  # in the child, a lock that another thread held would be held for ever
    os.register_at_fork(after_in_child=_locks.clear)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # compilers run it as it is
def warn_of_no_grad() -> None:
    """Says once that training goes around a router; in compiled code, when it is compiled."""
    warn_once(
        "no gradient flows through a routing, neither to hidden nor to the gate's parameters, of which one requires "
        "it here: their grad stays as it is. Call the gate under torch.no_grad() if none is wanted"
    )
