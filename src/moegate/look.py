"""The look of every call: are a gate's tensors still those that the last refresh noted?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moegate.plain import is_plain
from moegate.routing import RouterTensors

_TensorGuards: Any
try:  # the guards of torch.compile: one call compares type, dtype, device, sizes and strides of several tensors
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _TensorGuards = None

NAMES = ("weight", *RouterTensors._fields)
Given = tuple[Tensor | None, ...]
"""A gate's tensors, in the order of `NAMES`."""
Look = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
"""(parameters, buffers) of a gate -> True if they are as they were noted."""
Form = tuple[torch.dtype, torch.Size, "tuple[int, ...] | None", torch.device]
"""Dtype, shape, strides (None: contiguous), device."""

_KINDS = (Tensor, nn.Parameter)


def form_of(tensor: Tensor | None) -> Form | None:
    """All of a tensor that a plan depends on: not its values or its address."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, None if tensor.is_contiguous() else tensor.stride(), tensor.device


def place_of(tensor: Tensor) -> tuple[int, int | None]:
    """A tensor's address and version counter; None: an inference tensor has no version."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


class Questions(NamedTuple):
    """Three functions that compare the forms of tensors with noted ones, the fastest first."""

    quick: Callable[..., bool]
    """By guards that hold outside of inference mode."""
    in_inference: Callable[..., bool]
    """By guards that hold in inference mode."""
    is_alike: Callable[..., bool]
    """By public attributes; right in any PyTorch and any mode."""


def questions_about(*tensors: Tensor) -> Questions:
    """Functions that compare a later call's tensors, the weight first, with these tensors."""
    forms = tuple(map(form_of, tensors))

    def is_alike(*now: Any) -> bool:
        weight = now[0]
        if type(weight) not in _KINDS and not (isinstance(weight, Tensor) and is_plain(weight)):
            return False
        return tuple(map(form_of, now)) == forms

    with torch.inference_mode():
        in_inference = _quick_question(*tensors)
    return Questions(_quick_question(*tensors), in_inference, is_alike)


def look_of(
    own: Mapping[str, Tensor],
    questions: Questions,
    places: Mapping[str, tuple[int, int | None]],
    buffers: frozenset[str],
) -> Look:
    """Makes the look of one gate.

    Args:
        own: The tensors that must be the same objects, by name, in the order of `NAMES`. Without the weight: any weight
            of the noted form will do. Tensors that the spec does not ask for are left to `TakesNote.__setattr__`.
        questions: About the weight, then the other tensors of `own`.
        places: Address and version of the tensors that must not have been moved or written to.
        buffers: The names of the gate's buffers; all other names are parameters.
    """
    counted = tuple(name for name, (_, version) in places.items() if version is not None)
    values: dict[str, object] = {f"{name}_place": place for name, (place, _) in places.items()}
    values |= {f"{name}_address": own[name].data_ptr for name in places}
    values |= {f"{name}_version": places[name][1] for name in counted}
    values |= {"all_own": tuple(own.values()), **questions._asdict(), **own}
    exec(
        _code(tuple(own), tuple(places), counted, tuple(values), buffers.intersection(own)), values
    )  # the code is made of the names above alone
    return values["holds"]  # type: ignore[return-value]


@cache
def _code(
    own: tuple[str, ...],
    moved: tuple[str, ...],
    counted: tuple[str, ...],
    values: tuple[str, ...],
    buffers: frozenset[str],
) -> CodeType:
    """The code of a look, which runs in every call: each tenth of a microsecond counts.

    The look is a single expression, since a loop would double its time. Noted values are default arguments and
    `data_ptr` is a bound method, both for faster lookups.
    """
    at = {name: f"{'buffers' if name in buffers else 'parameters'}[{name!r}]" for name in ("weight", *own)}
    asked = "*all_own" if "weight" in own else ", ".join([at["weight"], *own])
    terms = [
        *(f"{at[name]} is {name}" for name in own),
        *(f"{name}_address() == {name}_place" for name in moved),
        *(f"{name}._version == {name}_version" for name in counted),
        f"(quick({asked}) or in_inference({asked}) or is_alike({asked}))",
    ]
    defaults = ", ".join(f"{name}={name}" for name in values)
    text = (
        f"def holds(parameters, buffers, {defaults}):\n"
        "    try:\n"
        f"        return {' and '.join(terms)}\n"
        "    except KeyError:\n"
        "        return False\n"
    )
    return compile(text, f"<the look at {', '.join(own) or 'a weight'}>", "exec")


def _quick_question(*tensors: Tensor) -> Callable[..., bool]:
    """A comparison with the forms of these tensors in the current mode; always False where PyTorch has no guards."""
    if _TensorGuards is None:
        return _no
    sizes, strides = [list(tensor.size()) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    try:
        guards = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return guards.check if guards.check(*tensors) else _no
    except (TypeError, ValueError, RuntimeError):  # a PyTorch whose guards have another signature
        return _no


def _no(*tensors: Tensor) -> bool:
    return False
