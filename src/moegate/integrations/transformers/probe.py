"""A trial of a router class on random numbers: does moegate return what the class returns?

A config may have keys that the catalog reads and the class ignores, and a class may have been changed by others. So
nothing is taken over on the word of a config.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moegate.integrations.transformers.forms import OUTPUTS, form_of

TOKENS = 17
# In float32 the two differ by the order of a sum. A row may differ where two keys are closer than that.
_RTOL, _ATOL, _ROWS = 1e-3, 1e-4, TOKENS - 1


@torch.no_grad()
def agrees(router: nn.Module, taken: Any) -> bool:
    """True if the class and moegate return the same for a few random tokens.

    Args:
        router: A router of the class on a CPU, in float32, which nobody else uses; its tensors are overwritten.
        taken: The `TakenRouter` of that router.
    """
    generator = torch.Generator().manual_seed(0)
    for tensor in (*router.parameters(), *router.buffers()):
        _fill(tensor, generator)
    hidden = torch.randn((1, TOKENS, taken.exact.hidden_size), generator=generator)
    rows = hidden if taken.flattens else hidden[0]
    second: dict[str | None, Any] = {
        None: (),
        "input_ids": (torch.arange(TOKENS),),
        "e_score_correction_bias": (torch.randn(taken.exact.num_selectable, generator=generator) * 0.1,),
    }
    given = second[form_of(type(router).__name__).argument]
    own, ours = type(router).forward(router, rows, *given), taken.route(router, rows, *given)
    return len(own) == len(ours) and all(map(_same, taken.returns, _by_id(own, taken), _by_id(ours, taken)))


def _fill(tensor: Tensor, generator: torch.Generator) -> None:
    if not tensor.is_floating_point():  # a table of expert ids, distinct in a row
        tensor.copy_(torch.arange(tensor.shape[-1]).expand_as(tensor))
        return
    values = torch.randn(tensor.shape, generator=generator)
    tensor.data = values * tensor.shape[-1] ** -0.5 * 2 if tensor.dim() == 2 and len(tensor) > 1 else values * 0.1 + 1


def _by_id(output: tuple[Tensor, ...], taken: Any) -> list[Tensor]:
    """What was returned, with ids and weights in the order of the ids."""
    found = dict(zip(taken.returns, output, strict=True))
    if "topk_ids" in found:
        found["topk_ids"], order = found["topk_ids"].sort(dim=-1)
        found["topk_weights"] = found["topk_weights"].gather(-1, order)
    return list(found.values())


def _same(name: str, own: Tensor, ours: Tensor) -> bool:
    assert name in OUTPUTS
    if own.shape != ours.shape or own.dtype != ours.dtype:
        return False
    rows = torch.isclose(own.double(), ours.double(), rtol=_RTOL, atol=_ATOL, equal_nan=True).flatten(1).all(dim=1)
    return int(rows.sum()) >= _ROWS
