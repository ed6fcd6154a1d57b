"""The look of every call: whether a gate's tensors are what it took note of."""

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
try:  # what compiled code asks of its inputs: type, dtype, device, sizes and strides of several tensors in one call
    from torch._C._dynamo.guards import TensorGuards as _TensorGuards
except ImportError:
    _TensorGuards = None

NAMES = ("weight", *RouterTensors._fields)
Given = tuple[Tensor | None, ...]
"""A gate's tensors, in the order of `NAMES`."""
Look = Callable[[Mapping[str, Any], Mapping[str, Any]], bool]
"""Whether a gate's parameters and buffers are as they were noted."""
Form = tuple[torch.dtype, torch.Size, "tuple[int, ...] | None", torch.device]
"""Dtype, shape, strides (None: contiguous), device."""

_KINDS = (Tensor, nn.Parameter)


def form_of(tensor: Tensor | None) -> Form | None:
    """What a tensor is apart from its values."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, None if tensor.is_contiguous() else tensor.stride(), tensor.device


def place_of(tensor: Tensor) -> tuple[int, int | None]:
    """A tensor's address, and how many writes it counts; None: an inference tensor counts none."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


class Questions(NamedTuple):
    """Whether tensors are like others, but for their values: three ways to ask, the quickest first."""

    quick: Callable[..., bool]
    in_inference: Callable[..., bool]
    """As quick, and right in inference mode."""
    is_alike: Callable[..., bool]
    """In words that any PyTorch has, and right under any mode."""


def questions_about(*tensors: Tensor) -> Questions:
    """What is to be asked of a gate's tensors, the weight first, in any later call."""
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
    """The look for one gate.

    Args:
        own: The tensors that must be the same objects, by name, in the order of `NAMES`. Without the weight: any that
            is alike. Of a tensor that the spec does not ask for, `Gate.__setattr__` tells if one comes.
        questions: About the weight and the others in this order.
        places: Of the tensors among them that must not have been moved or written to.
        buffers: The names that are the gate's buffers; the others are its parameters.
    """
    counted = tuple(name for name, (_, version) in places.items() if version is not None)
    values: dict[str, object] = {f"{name}_place": place for name, (place, _) in places.items()}
    values |= {f"{name}_address": own[name].data_ptr for name in places}
    values |= {f"{name}_version": places[name][1] for name in counted}
    values |= {"all_own": tuple(own.values()), **questions._asdict(), **own}
    exec(
        _code(tuple(own), tuple(places), counted, tuple(values), buffers.intersection(own)), values
    )  # of nothing but the names above
    return values["holds"]  # type: ignore[return-value]


@cache
def _code(
    own: tuple[str, ...],
    moved: tuple[str, ...],
    counted: tuple[str, ...],
    values: tuple[str, ...],
    buffers: frozenset[str],
) -> CodeType:
    """The code of a look. It runs in every call, so that every tenth of a microsecond in it counts.

    One expression, since a loop takes as long as the questions in it; what is compared with is an argument with a
    default, and `data_ptr` bound to its tensor, which is looked up faster.
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
    """Whether tensors are like these, in the mode of now; it says no where PyTorch cannot tell."""
    if _TensorGuards is None:
        return _no
    sizes, strides = [list(tensor.size()) for tensor in tensors], [list(tensor.stride()) for tensor in tensors]
    try:
        guards = _TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return guards.check if guards.check(*tensors) else _no
    except (TypeError, ValueError, RuntimeError):  # a PyTorch in which it goes by other words
        return _no


def _no(*tensors: Tensor) -> bool:
    return False
