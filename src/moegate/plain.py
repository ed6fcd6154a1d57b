"""Two questions: is a tensor plain, with dense values at an address, and do PyTorch's operations compute now?"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

# All that intercepts PyTorch's operations. PyTorch has no public names for these.
_modes = torch._C._len_torch_dispatch_stack  # FakeTensorMode, make_fx, counters of operations
_transform = torch._C._functorch.peek_interpreter_stack  # torch.func.vmap, grad, functionalize
_trace = torch._C._get_tracing_state  # torch.jit.trace

is_compiling = torch.compiler.is_compiling

META = torch.device("meta")
"""Stands for the device of tensors that are not plain: as on meta, only PyTorch's operations can route them."""


def is_taken_over() -> bool:
    """True while a mode, a transform or a tracer intercepts PyTorch's operations; for compilers: `is_compiling`."""
    return bool(_modes()) or _transform() is not None or _trace() is not None


def is_plain(tensor: Tensor) -> bool:
    """True for a tensor or Parameter that is no wrapper, such as a DTensor, a fake tensor or one of torch.func."""
    return _is_plain_type(type(tensor)) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@cache
def _is_plain_type(kind: type[Tensor]) -> bool:
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def are_plain(values: Iterable[object]) -> bool:
    """True if every tensor among the values is plain, and nothing intercepts operations."""
    for value in values:
        if type(value) is not Tensor and isinstance(value, Tensor) and not is_plain(value):
            return False
    return not is_taken_over()


def can_be_asked(tensor: Tensor) -> bool:
    """True if a branch may depend on the tensor's values: a plain tensor on a CPU, while nothing intercepts operations.

    Values on a GPU would need a synchronization; values under a compiler or a transform do not exist.
    """
    return tensor.is_cpu and not is_compiling() and not is_taken_over() and _is_plain_type(type(tensor))
