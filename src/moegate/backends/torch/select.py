"""Logits to experts and weights, with PyTorch ops: docs/contract.md in float32, on any device."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from moegate.backends.torch.top_k import top_k
from moegate.contract.reference import FLOAT32_MAX, LEAST_SUM
from moegate.routing import Routing, RouterTensors
from moegate.spec import RouterSpec


def select(logits: Tensor, spec: RouterSpec, tensors: RouterTensors, input_ids: Tensor | None) -> Routing:
    """Logits [M, R], float32 or bfloat16, to the routing."""
    coarse = logits.dtype == torch.bfloat16 and spec.selects_on_logits
    logits = logits.float()
    all_finite = _known_finite(logits)
    row_is_nan = None
    if not all_finite:
        row_is_nan = logits.amax(dim=-1, keepdim=True).isnan()  # a maximum carries a NaN on, in one pass
        logits = logits.nan_to_num(nan=-FLOAT32_MAX)

    scores = None
    if spec.hash_routing:
        assert tensors.tid2eid is not None and input_ids is not None
        ids, outside = _look_up(input_ids, tensors.tid2eid)
        row_is_nan = outside if row_is_nan is None else row_is_nan | outside
    else:
        keys, scores = _choice_keys(logits, spec, tensors)
        ids = top_k(_mask_groups(keys, spec), spec.top_k, coarse=coarse)

    weights, shared = _weights(ids, logits, scores, spec, tensors)
    identity = None
    if spec.num_zero_experts:
        identity = weights.masked_fill(ids < spec.num_experts, 0).sum(dim=-1, keepdim=True)
    dtype = getattr(torch, spec.topk_weights_dtype)
    weights, shared, identity = (
        part if part is None else (part if row_is_nan is None else part.masked_fill(row_is_nan, torch.nan)).to(dtype)
        for part in (weights, shared, identity)
    )
    assert weights is not None
    return Routing(
        topk_ids=ids.to(torch.int32),
        topk_weights=weights,
        shared_weights=shared,
        identity_weight=None if identity is None else identity.squeeze(-1),
    )


def _known_finite(logits: Tensor) -> bool:
    """True if there is surely no NaN and no infinity among the logits [M, R], so that no row is special.

    A finite sum proves it. Only a CPU can be asked: elsewhere the answer is a wait, in a graph a break.
    """
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return math.isfinite(float(logits.sum()))


def _choice_keys(logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> tuple[Tensor, Tensor | None]:
    """Logits [M, R] -> the keys [M, E] and, where they came by, the experts' scores [M, E]."""
    selectable = logits[:, : spec.num_selectable]
    if spec.selects_on_logits:
        return selectable, None
    transformed = _transform(selectable, spec)
    bias = tensors.e_score_correction_bias
    if spec.correction_bias == "logit":
        assert bias is not None
        return (transformed + bias).nan_to_num(nan=-FLOAT32_MAX), None
    scores = _score(transformed, spec)
    if bias is None:
        return scores, scores
    return (scores + bias).nan_to_num(nan=-FLOAT32_MAX), scores


def _mask_groups(keys: Tensor, spec: RouterSpec) -> Tensor:
    """Keys [M, E] with -inf, which is below every key, outside of the topk_group best groups."""
    if spec.n_group == 1:
        return keys
    grouped = keys.unflatten(-1, (spec.n_group, -1))
    if spec.group_score == "max":
        group_scores = grouped.amax(dim=-1)
    else:
        group_scores = grouped.topk(2, dim=-1, sorted=False).values.sum(dim=-1)
    # A stable sort gives equal groups in the order of their ids; there are few groups.
    order = group_scores.sort(dim=-1, descending=True, stable=True).indices
    dropped = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, order[:, spec.topk_group :], True)
    return grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1)


def _look_up(input_ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids [M] -> expert ids [M, k], and a mask [M, 1] of the token ids outside the table.

    On a CPU an id outside the table was refused before. A GPU cannot be asked without waiting for
    it: there such an id reads the nearest row of the table, and its weights become NaN.
    """
    rows = input_ids.long()
    outside = (rows < 0) | (rows >= len(table))
    return table[rows.clamp(0, len(table) - 1)].long(), outside.unsqueeze(-1)


def _weights(
    ids: Tensor, finite: Tensor, scores: Tensor | None, spec: RouterSpec, tensors: RouterTensors
) -> tuple[Tensor, Tensor | None]:
    """The weights of the chosen ids [M, k] and, if the spec has any, of the shared gates."""
    shared = None
    if spec.softmax_over_selected:
        weights = torch.softmax(_transform(finite.gather(1, ids), spec), dim=-1)
    elif spec.weights_from == "sigmoid_of_selected":
        weights = torch.sigmoid(_transform(finite.gather(1, ids), spec))
    elif scores is not None:
        weights = scores.gather(1, ids)
    elif spec.scoring_func == "softmax":
        weights = _score(_transform(finite[:, : spec.num_selectable], spec), spec).gather(1, ids)
    else:
        weights = _score(_transform(finite.gather(1, ids), spec), spec)
    if spec.num_shared_gates:
        shared = _score(_transform(finite[:, spec.num_selectable :], spec), spec)

    scale: Tensor | float = spec.routed_scaling_factor
    if tensors.global_scale is not None:
        scale = tensors.global_scale.float() * scale
    if spec.renormalize and not spec.softmax_over_selected:
        total = weights.sum(dim=-1, keepdim=True)
        if shared is not None:
            total = total + shared.sum(dim=-1, keepdim=True)
        total = (total + spec.renormalize_eps).clamp(min=max(spec.renormalize_floor, LEAST_SUM))
        weights, shared = weights / total, None if shared is None else shared / total
    if isinstance(scale, Tensor) or scale != 1.0:
        weights, shared = weights * scale, None if shared is None else shared * scale
    if tensors.per_expert_scale is not None:
        weights = weights * tensors.per_expert_scale.float()[ids]
    return weights, shared


def _transform(logits: Tensor, spec: RouterSpec) -> Tensor:
    if spec.logit_multiplier != 1.0:
        logits = (logits * spec.logit_multiplier).clamp(-FLOAT32_MAX, FLOAT32_MAX)
    if spec.logit_softcapping is not None:
        logits = torch.tanh(logits / spec.logit_softcapping) * spec.logit_softcapping
    return logits


def _score(logits: Tensor, spec: RouterSpec) -> Tensor:
    if spec.scoring_func == "softmax":
        return torch.softmax(logits, dim=-1)
    if spec.scoring_func == "sigmoid":
        return torch.sigmoid(logits)
    if spec.scoring_func == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return logits
