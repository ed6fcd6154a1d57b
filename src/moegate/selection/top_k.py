"""The k largest keys, in order: `torch.topk` alone promises nothing about equal keys."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.plain import can_be_asked
from moegate.spec import MAX_GATE_ROWS


def top_k(keys: Tensor, k: int, *, coarse: bool) -> Tensor:
    """Keys [M, E] float32, none NaN -> ids [M, k] int64: largest first, the lowest id first among equals.

    `coarse` says that every key is a bfloat16 value (or -inf), which leaves room for the id in 32 bits.
    """
    if can_be_asked(keys):  # which wrappers cannot, nor mix with the plain tensor of `_distinct`
        # On many rows a CPU sorts far longer than it looks for the k best of distinct integers.
        return _distinct(keys, coarse).topk(k, dim=-1).indices
    return keys.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def _distinct(keys: Tensor, coarse: bool) -> Tensor:
    """Keys [M, E] as distinct integers in the same order, the lower id above among equal keys."""
    bits = keys.contiguous().view(torch.int32)
    sign = bits >> 31
    ordered = (bits ^ (sign & 0x7FFFFFFF)).sub_(sign)  # the order of the floats; -0.0 becomes 0, like 0.0
    if not coarse:
        ordered = ordered.long().mul_(MAX_GATE_ROWS)
    return ordered.add_(torch.arange(keys.shape[1] - 1, -1, -1, dtype=ordered.dtype, device=keys.device))


def top_k_of_few(keys: Tensor, k: int, *, coarse: bool) -> tuple[Tensor, Tensor]:
    """The same for a few rows on a CPU: their k largest keys and ids, each [M, k].

    One key more than asked for shows a tie at the border. Coarse keys tie often, in 3 of 10 rows of
    normal logits at k = 8 of 128, so that for more than one of them the stable sort comes at once.
    """
    if not coarse or keys.shape[0] == 1:
        values, ids = keys.topk(min(k + 1, keys.shape[1]), dim=-1)
        is_distinct = all(len(set(row)) == len(row) for row in values.tolist())
    else:
        is_distinct = False
    if not is_distinct:
        values, ids = keys.sort(dim=-1, descending=True, stable=True)
    # Contiguous, as what the way for many rows gathers: a vector's tail is computed with other bits.
    return values[:, :k].contiguous(), ids[:, :k]


def top_k_per_group(keys: Tensor, n_group: int, k: int, *, coarse: bool, few: bool = False) -> tuple[Tensor, Tensor]:
    """The k / n_group largest of each of n_group groups, as keys and ids [M, k] in the order of `top_k`.

    `few` says that the rows are few, on a CPU; each group is a row of its own first.
    """
    rows, share = keys.unflatten(-1, (n_group, -1)).flatten(0, 1), k // n_group
    if few:
        values, ids = top_k_of_few(rows, share, coarse=coarse)
    else:
        ids = top_k(rows, share, coarse=coarse)
        values = rows.gather(1, ids)
    # The groups are in the order of their ids, and so are equal keys of one: a stable sort keeps the lowest id first.
    values, order = values.view(-1, k).sort(dim=-1, descending=True, stable=True)
    of_group = ids.reshape(-1, n_group, share)
    group = torch.ones_like(of_group).cumsum(1) - 1  # no arange: a wrapper's operations take no plain tensor
    return values, (of_group + group * rows.shape[1]).flatten(1).gather(1, order)
