"""Which tensors are dense numbers at an address, and whether PyTorch's operations compute at the moment."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

# Private names, for want of public ones: all that makes PyTorch's operations do something else than compute.
_modes = torch._C._len_torch_dispatch_stack  # FakeTensorMode, make_fx, counters of operations
_transform = torch._C._functorch.peek_interpreter_stack  # torch.func.vmap, grad, functionalize
_trace = torch._C._get_tracing_state  # torch.jit.trace

is_compiling = torch.compiler.is_compiling

META = torch.device("meta")
"""Stands for the device of tensors that are not plain: only PyTorch's operations take them, as on meta."""


def is_taken_over() -> bool:
    """True while a mode, a transform or a tracer has PyTorch's operations; of compilers `torch.compiler` tells."""
    return bool(_modes()) or _transform() is not None or _trace() is not None


def is_plain(tensor: Tensor) -> bool:
    """True if the tensor is not a wrapper: not fake, no DTensor, none of torch.func's. A Parameter is plain."""
    return _is_plain_type(type(tensor)) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@cache
def _is_plain_type(kind: type[Tensor]) -> bool:
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def are_plain(values: Iterable[object]) -> bool:
    """True if every tensor among the values is plain, and operations compute."""
    for value in values:
        if type(value) is not Tensor and isinstance(value, Tensor) and not is_plain(value):
            return False
    return not is_taken_over()


def can_be_asked(tensor: Tensor) -> bool:
    """True if a program may depend on the tensor's values: on a CPU, while operations compute, if it is plain.

    A GPU would answer after a wait; graphs and transforms have no answer.
    """
    return tensor.is_cpu and not is_compiling() and not is_taken_over() and _is_plain_type(type(tensor))
