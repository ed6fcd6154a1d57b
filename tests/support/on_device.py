"""The functions of moegate on the device of this run: arguments go there, results come back to the CPU.

Tests draw and compare on the CPU, so that a run with `--device cuda` sees the same numbers and the same oracle.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor

import moegate
from moegate import Gate, RouterSpec, Routing

DEVICE = torch.device("cpu")
"""Where the functions run; conftest.py sets it from `--device` before any test is collected."""


@overload
def there(value: Tensor) -> Tensor: ...
@overload
def there(value: object) -> object: ...
def there(value: object) -> object:
    """What is a tensor on the CPU, on the device of this run; everything else as it is.

    Strides and offset stay: rows that are apart, or all one, are what some tests are about.
    """
    if not isinstance(value, Tensor) or value.device.type != "cpu" or DEVICE.type == "cpu":
        return value
    if value.layout != torch.strided:
        return value.to(DEVICE)
    numbers = value.untyped_storage().nbytes() // value.element_size()
    whole = value.as_strided((numbers,), (1,), 0)
    return whole.to(DEVICE).as_strided(value.shape, value.stride(), value.storage_offset())


def all_there(given: dict[str, Any]) -> dict[str, Any]:
    return {name: there(value) for name, value in given.items()}


def back(routing: Routing) -> Routing:
    """The routing on the CPU; it must come from the device of this run."""
    for part in routing:
        assert part is None or part.device.type == DEVICE.type
    return Routing(*(None if part is None else part.cpu() for part in routing))  # type: ignore[arg-type]


def router_gemm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    given_bias = None if bias is None else there(bias)
    logits = moegate.router_gemm(there(hidden), there(weight), given_bias, out_dtype=out_dtype)
    assert logits.device.type == DEVICE.type
    return logits.cpu()


def select(logits: Tensor, spec: RouterSpec, **given: Any) -> Routing:
    return back(moegate.select(there(logits), spec, **all_there(given)))


def route(hidden: Tensor, weight: Tensor, spec: RouterSpec, **given: Any) -> Routing:
    return back(moegate.route(there(hidden), there(weight), spec, **all_there(given)))


def gate_there(spec: RouterSpec, weight: Tensor, **given: Any) -> Gate:
    """A gate whose tensors are on the device; it takes `there(hidden)`."""
    return Gate(spec, there(weight), **all_there(given))
