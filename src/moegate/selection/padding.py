"""Rows that are padding, in PyTorch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.routing import Routing


def with_padding(routing: Routing, padding: Tensor | None) -> Routing:
    """The routing of M rows with id -1 and weights of 0 in those that are padding.

    `padding`: a mask [M], or the number of rows in front that are no padding; None: all rows are tokens.
    """
    if padding is None:
        return routing
    ids, weights, logits, shared, identity = routing
    # No arange: a wrapper's operations take no plain tensor.
    mask = padding if padding.dtype == torch.bool else torch.ones_like(ids[:, 0]).cumsum(0) > padding
    row = mask.unsqueeze(-1)
    return Routing(
        ids.masked_fill(row, -1),
        weights.masked_fill(row, 0),
        logits,
        None if shared is None else shared.masked_fill(row, 0),
        None if identity is None else identity.masked_fill(mask, 0),
    )
