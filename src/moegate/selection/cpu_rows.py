"""A few rows on a CPU, without NaN or infinities: the same formulas in fewer operations."""

from __future__ import annotations

import math

from torch import Tensor, bfloat16

from moegate.plain import can_be_asked
from moegate.routing import RouterTensors, Routing
from moegate.selection.formulas import FEW_ROWS, choice_keys, mask_groups, routing_of, weights_of
from moegate.selection.top_k import top_k_of_few, top_k_per_group
from moegate.spec import RouterSpec


def select_few_plain_rows(logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> Routing | None:
    """Logits [M, R] to the routing; None if there are many rows or special values, or nobody can tell."""
    if not can_be_asked(logits) or logits.shape[0] > FEW_ROWS or spec.hash_routing or spec.num_shared_gates:
        return None
    wide = logits if spec.selects_on_logits else logits.float()
    keys, scores = choice_keys(wide, spec, tensors)
    # Of the keys too: they have the bias in them, which may switch experts off with -inf, or be a wrapper.
    if not _has_finite_sum(wide) or not (keys is wide or (type(keys) is Tensor and _has_finite_sum(keys))):
        return None
    coarse = wide.dtype == bfloat16
    if spec.select_per_group:
        values, ids = top_k_per_group(keys, spec.n_group, spec.top_k, coarse=coarse, few=True)
    else:
        values, ids = top_k_of_few(mask_groups(keys, spec), spec.top_k, coarse=coarse)
    selected = values.float() if spec.selects_on_logits else None
    weights, _ = weights_of(ids, selected, wide, scores, spec, tensors)
    return routing_of(ids, weights, logits, None, None, spec)


def known_finite(logits: Tensor) -> bool:
    """True if there is surely no NaN and no infinity among the logits, so that no row is special.

    A finite sum proves it.
    """
    return can_be_asked(logits) and _has_finite_sum(logits)


def _has_finite_sum(logits: Tensor) -> bool:
    return math.isfinite(logits.sum())
