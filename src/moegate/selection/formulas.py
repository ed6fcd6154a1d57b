"""The formulas of docs/contract.md, parts 2 to 4, in PyTorch's operations: float32, on any device."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from moegate.contract.limits import FLOAT32_MAX, least_sum
from moegate.plain import can_be_asked
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec

FEW_ROWS = 16
"""Up to so many rows on a CPU every operation counts, and looking for special values costs less than masking them."""


def choice_keys(logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> tuple[Tensor, Tensor | None]:
    """Logits [M, R] -> the keys [M, E] and, where they came by, the experts' scores [M, E]."""
    selectable = logits if spec.num_shared_gates == 0 else logits[:, : spec.num_selectable]
    if spec.selects_on_logits:
        return selectable, None
    transformed = _transform(selectable, spec)
    bias = tensors.e_score_correction_bias
    if spec.correction_bias == "logit":
        assert bias is not None
        return transformed + bias, None
    scores = _score(transformed, spec)
    return (scores if bias is None else scores + bias), scores


def mask_groups(keys: Tensor, spec: RouterSpec) -> Tensor:
    """Keys [M, E] with -inf, which is below every key, outside of the topk_group best groups."""
    if spec.n_group == 1:
        return keys
    grouped: Tensor = keys.unflatten(-1, (spec.n_group, -1))
    if spec.num_group_score_keys == 1:
        group_scores = grouped.amax(dim=-1)
    elif spec.num_group_score_keys == 2:
        group_scores = grouped.topk(2, dim=-1, sorted=False).values.sum(dim=-1)
    else:
        # One by one, the best first: the contract's order, of which a sum over a dimension knows nothing.
        group_scores = reduce(torch.add, grouped.topk(spec.num_group_score_keys, dim=-1).values.unbind(dim=-1))
    # A stable sort gives equal groups in the order of their ids; there are few groups.
    order = group_scores.sort(dim=-1, descending=True, stable=True).indices
    dropped = torch.zeros_like(group_scores, dtype=torch.bool).scatter(
        1, order[:, spec.topk_group :], 1
    )  # jit takes no True
    return grouped.masked_fill(dropped.unsqueeze(-1), -torch.inf).flatten(1)


def weights_of(
    ids: Tensor,
    selected: Tensor | None,
    logits: Tensor,
    scores: Tensor | None,
    spec: RouterSpec,
    tensors: RouterTensors,
) -> tuple[Tensor, Tensor | None]:
    """The weights of the chosen ids [M, k] and those of the shared gates.

    `selected` are the logits of the ids and `scores` those of all experts, where they are at hand.
    """
    shared = None
    from_scores = spec.weights_from == "score" and not spec.softmax_over_selected
    if from_scores and (scores is not None or spec.scoring_func == "softmax"):
        if scores is None:
            scores = _score(_transform(logits[:, : spec.num_selectable].float(), spec), spec)
        weights = scores.gather(1, ids)
    else:
        selected = _transform(logits.gather(1, ids) if selected is None else selected, spec)
        if spec.softmax_over_selected:
            weights = _softmax_of_few(selected)
        else:
            weights = torch.sigmoid(selected) if spec.weights_from == "sigmoid_of_selected" else _score(selected, spec)
    if spec.num_shared_gates:
        shared = _score(_transform(logits[:, spec.num_selectable :], spec), spec)

    scale: Tensor | float = spec.routed_scaling_factor
    if tensors.global_scale is not None:
        scale = tensors.global_scale.float() * scale
    if spec.renormalize and not spec.softmax_over_selected:
        total = weights.sum(dim=-1, keepdim=True)
        if shared is not None:
            total = total + shared.sum(dim=-1, keepdim=True)
        total = total + spec.renormalize_eps
        if spec.renormalize_eps < least_sum(spec):
            total = total.clamp(min=least_sum(spec))
        weights, shared = weights / total, None if shared is None else shared / total
    if isinstance(scale, Tensor) or scale != 1.0:
        weights, shared = weights * scale, None if shared is None else shared * scale
    if tensors.per_expert_scale is not None:
        weights = weights * tensors.per_expert_scale.float()[ids]
    return weights, shared


def _softmax_of_few(logits: Tensor) -> Tensor:
    """A softmax over a short last dimension; a CPU's own has a cost for each row, which tells when they are many."""
    if not can_be_asked(logits) or logits.shape[0] <= FEW_ROWS:
        return torch.softmax(logits, dim=-1)
    weights = (logits - logits.amax(dim=-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(dim=-1, keepdim=True))


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
    assert spec.scoring_func == "identity", spec.scoring_func
    return logits


def routing_of(
    ids: Tensor, weights: Tensor, logits: Tensor, shared: Tensor | None, row_is_nan: Tensor | None, spec: RouterSpec
) -> Routing:
    """The routing: NaN weights in the rows that had a NaN, and the dtype that the spec asks for."""
    identity = None
    if spec.num_zero_experts:
        identity = weights.masked_fill(ids < spec.num_experts, 0).sum(dim=-1, keepdim=True)
    return Routing(
        ids.to(getattr(torch, spec.topk_ids_dtype)).contiguous(),  # they may be the first k columns of all
        _finished(weights, row_is_nan, spec),
        logits,
        None if shared is None else _finished(shared, row_is_nan, spec),
        None if identity is None else _finished(identity, row_is_nan, spec).squeeze(-1),
    )


def _finished(weights: Tensor, row_is_nan: Tensor | None, spec: RouterSpec) -> Tensor:
    if row_is_nan is not None:
        weights = weights.masked_fill(row_is_nan, torch.nan)
    return weights if spec.topk_weights_dtype == "float32" else weights.to(getattr(torch, spec.topk_weights_dtype))
