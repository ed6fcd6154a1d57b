"""The functions of moegate on the device of this run: arguments are copied to the device, results to the CPU.

Tests draw and compare on the CPU, so that runs with `--device cuda` have the same numbers and the same oracle.
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
    """Copies tensors from the CPU to the device of this run; other values are returned unchanged.

    Strides and storage offset are kept, since some tests are about rows that are apart or all the same.
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
    """Copies a routing to the CPU; asserts that it comes from the device of this run."""
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
    """A gate with tensors on the device, to be called with `there(hidden)`."""
    return Gate(spec, there(weight), **all_there(given))
