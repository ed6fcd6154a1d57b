"""What takes the routing away from logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moegate import Routing
from moegate.integrations.vllm.routed_logits import RoutedLogits, plain

HARMLESS: list[Callable[[Tensor], Any]] = [
    lambda x: x.shape,
    lambda x: x.dtype,
    lambda x: x.device,
    lambda x: x.size(0),
    lambda x: x.dim(),
]
HARMFUL: list[Callable[[Tensor], Any]] = [
    lambda x: x.add_(1),
    lambda x: x.mul_(2),
    lambda x: x.zero_(),
    lambda x: x.__setitem__(0, 1.0),
    lambda x: x[1:],
    lambda x: x[:, 0],
    lambda x: x.chunk(2),
    lambda x: x.clone(),
    lambda x: x.contiguous(),
    lambda x: x.float(),
    lambda x: x.to(torch.bfloat16),
    lambda x: x.view(-1),
    lambda x: x.detach(),
    lambda x: x.data,
    lambda x: x.data_ptr(),
    lambda x: x.untyped_storage(),
    lambda x: x.numpy(),
    lambda x: torch.cat([x, x]),
    lambda x: torch.empty_like(x).copy_(x),
    lambda x: torch.softmax(x, dim=-1, out=torch.empty(4, 8)),
    lambda x: torch.ops.aten.relu_(x),
    lambda x: torch.nn.functional.relu(x, inplace=True),
]


def logits() -> RoutedLogits:
    values = torch.arange(32.0).reshape(4, 8)
    return RoutedLogits.of(Routing(torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, 2), values))


@pytest.mark.parametrize("use", HARMLESS)
@torch.inference_mode()
def test_a_look_at_the_form_keeps_it(use: Callable[[Tensor], Any]) -> None:
    routed = logits()
    use(routed)
    assert routed.routing is not None
    assert routed.routing.logits is None


@pytest.mark.parametrize("use", HARMFUL)
@torch.inference_mode()
def test_everything_else_takes_it_away(use: Callable[[Tensor], Any]) -> None:
    routed = logits()
    result = use(routed)
    assert routed.routing is None
    for part in result if isinstance(result, tuple) else (result,):
        assert not isinstance(part, RoutedLogits)


def test_a_plain_tensor_has_the_same_memory() -> None:
    routed = logits()
    assert type(plain(routed)) is Tensor
    assert plain(routed).data_ptr() == routed.data_ptr()
    assert plain(routed).equal(torch.arange(32.0).reshape(4, 8))
    other = torch.zeros(1)
    assert plain(other) is other
