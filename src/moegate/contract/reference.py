"""The contract as a program: docs/contract.md in PyTorch, written for readers, in any float dtype.

In float64 the program is the oracle of every test. It shares no code with the backends.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from moegate.contract.limits import FLOAT32_MAX, least_sum
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec


def router_logits(
    hidden: Tensor, weight: Tensor, spec: RouterSpec, tensors: RouterTensors, dtype: torch.dtype = torch.float64
) -> Tensor:
    """[M, K] and [R, K] -> logits [M, R] in `dtype`, rounded to bfloat16 values if the spec says so."""
    hidden = normed_input(hidden, spec, tensors, dtype)
    logits: Tensor = hidden @ weight.to(dtype).T
    if tensors.bias is not None:
        logits = logits + tensors.bias.to(dtype)
    if spec.logits_dtype == "bfloat16":
        logits = logits.to(torch.bfloat16).to(dtype)
    return logits


def normed_input(hidden: Tensor, spec: RouterSpec, tensors: RouterTensors, dtype: torch.dtype) -> Tensor:
    """[M, K] in `dtype`: `hidden`, or its RMS norm times input_scale * K**-0.5."""
    hidden = hidden.to(dtype)
    if spec.input_norm_eps is None:
        return hidden
    assert tensors.input_scale is not None
    mean_square = hidden.square().mean(dim=-1, keepdim=True)
    normed = hidden * torch.rsqrt(mean_square + spec.input_norm_eps)
    scaled: Tensor = normed * tensors.input_scale.to(dtype) * spec.hidden_size**-0.5
    return scaled


def select(
    logits: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    input_ids: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    padding: Tensor | None = None,
) -> Routing:
    """Logits [M, R] -> the routing, every formula evaluated in `dtype`."""
    is_padding = rows_of_padding(padding, logits)
    has_nan = logits.isnan().any(dim=-1, keepdim=True)
    finite = finite_logits(logits, dtype)
    if spec.hash_routing:
        assert tensors.tid2eid is not None and input_ids is not None
        ids = tensors.tid2eid[input_ids.long().masked_fill(is_padding, 0)].long()
    else:
        keys = choice_keys(finite, spec, tensors)
        ids = best_first(keys, spec.top_k, eligible_experts(keys, spec))

    weights, shared_weights = weights_at(ids, finite, spec, tensors)
    identity_weight = weights.masked_fill(ids < spec.num_experts, 0).sum(dim=-1, keepdim=True)
    weights, shared_weights, identity_weight = (
        each.masked_fill(has_nan, torch.nan).masked_fill(is_padding[:, None], 0)
        for each in (weights, shared_weights, identity_weight)
    )
    return Routing(
        topk_ids=ids.masked_fill(is_padding[:, None], -1).to(getattr(torch, spec.topk_ids_dtype)),
        topk_weights=weights,
        shared_weights=shared_weights if spec.num_shared_gates else None,
        identity_weight=identity_weight.squeeze(-1) if spec.num_zero_experts else None,
    )


def rows_of_padding(padding: Tensor | None, rows: Tensor) -> Tensor:
    """A mask [M] of the rows [M, ...] that are padding: a mask, or how many rows in front are no padding."""
    if padding is None:
        return torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    return padding if padding.dtype == torch.bool else torch.arange(len(rows), device=rows.device) >= padding


def finite_logits(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Replaces infinities by the largest finite float32 of their sign, and NaN by the lowest."""
    return logits.to(dtype).nan_to_num(nan=-FLOAT32_MAX, posinf=FLOAT32_MAX, neginf=-FLOAT32_MAX)


def transformed(logits: Tensor, spec: RouterSpec) -> Tensor:
    """The logits after multiplier and soft cap, from which scores are computed."""
    logits = (logits * spec.logit_multiplier).clamp(-FLOAT32_MAX, FLOAT32_MAX)
    if spec.logit_softcapping is not None:
        logits = spec.logit_softcapping * torch.tanh(logits / spec.logit_softcapping)
    return logits


def scores_of(logits: Tensor, spec: RouterSpec) -> Tensor:
    """Transformed logits -> scores, of the same shape; for a softmax: of the selectable experts only."""
    match spec.scoring_func:
        case "softmax":
            return torch.softmax(logits, dim=-1)
        case "sigmoid":
            return torch.sigmoid(logits)
        case "sqrtsoftplus":
            softplus = logits.clamp(min=0) + torch.log1p(torch.exp(-logits.abs()))
            return torch.sqrt(softplus)
        case "identity":
            return logits
    raise AssertionError(spec.scoring_func)


def choice_keys(logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> Tensor:
    """Finite logits [M, R] -> choice keys [M, E], which are finite too."""
    selectable = logits[:, : spec.num_selectable]
    if spec.selects_on_logits:
        return selectable
    keys = transformed(selectable, spec)
    if spec.correction_bias != "logit":
        keys = scores_of(keys, spec)
    if spec.correction_bias is not None:
        assert tensors.e_score_correction_bias is not None
        keys = keys + tensors.e_score_correction_bias.to(keys.dtype)
    return finite_logits(keys, keys.dtype).clamp(-FLOAT32_MAX, FLOAT32_MAX)


def group_scores(keys: Tensor, spec: RouterSpec) -> Tensor:
    """Keys [M, E] -> the score of each group [M, n_group]."""
    return last_sum(group_sums(keys, spec))


def group_sums(keys: Tensor, spec: RouterSpec) -> Tensor:
    """Keys [M, E] -> the running sums [M, n_group, j] of each group's best keys, added best first."""
    best = keys.unflatten(-1, (spec.n_group, -1)).topk(spec.num_group_score_keys, dim=-1).values
    return torch.stack(list(accumulate(best.unbind(dim=-1))), dim=-1)


def last_sum(sums: Tensor) -> Tensor:
    """The last running sum [M, n_group]; infinite if an earlier one is."""
    total = sums[..., -1]
    # Sums that float32 rounds to infinity tie; in a wider dtype, twice the maximum stands for infinity. A sum of
    # -infinity stays infinite by itself, since all later keys are negative too; a sum of +infinity is kept here.
    beyond = FLOAT32_MAX * (1 + 2.0**-25)
    infinite = torch.full_like(total, 2) * FLOAT32_MAX
    total = torch.where(total <= -beyond, -infinite, total)
    return torch.where((sums >= beyond).any(dim=-1), infinite, total)


def eligible_experts(keys: Tensor, spec: RouterSpec) -> Tensor:
    """Keys [M, E] -> a mask [M, E] of the experts of the topk_group best groups, or of each group's best experts."""
    if spec.n_group == 1:
        return torch.ones_like(keys, dtype=torch.bool)
    if spec.select_per_group:
        grouped = keys.unflatten(-1, (spec.n_group, -1)).flatten(0, 1)
        best = best_first(grouped, spec.top_k // spec.n_group)
        return torch.zeros_like(grouped, dtype=torch.bool).scatter(1, best, True).view(keys.shape)
    groups = best_first(group_scores(keys, spec), spec.topk_group)
    kept = torch.zeros(len(keys), spec.n_group, dtype=torch.bool, device=keys.device).scatter(1, groups, True)
    return kept.repeat_interleave(spec.num_selectable // spec.n_group, dim=-1)


def best_first(keys: Tensor, k: int, eligible: Tensor | None = None) -> Tensor:
    """Keys [M, E] -> the ids [M, k] of the k largest, in descending order, the lowest id first among equals."""
    if eligible is not None:
        keys = keys.masked_fill(~eligible, -torch.inf)  # below every key, since keys are finite
    order: Tensor = keys.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :k]


def weights_at(ids: Tensor, logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> tuple[Tensor, Tensor]:
    """The weights of the chosen ids [M, k] and of the shared gates [M, num_shared_gates]."""
    logits = transformed(logits, spec)
    selected = logits[:, : spec.num_selectable].gather(-1, ids)
    shared = logits[:, spec.num_selectable :]
    if spec.softmax_over_selected:
        weights = torch.softmax(selected, dim=-1)
    elif spec.weights_from == "sigmoid_of_selected":
        weights = torch.sigmoid(selected)
    else:
        weights = scores_of(logits[:, : spec.num_selectable], spec).gather(-1, ids)
        shared = scores_of(shared, spec)
    if spec.renormalize and not spec.softmax_over_selected:
        total = weights.sum(dim=-1, keepdim=True) + shared.sum(dim=-1, keepdim=True) + spec.renormalize_eps
        total = total.clamp(min=least_sum(spec))
        weights, shared = weights / total, shared / total

    factor = torch.full((1,), spec.routed_scaling_factor, dtype=logits.dtype, device=logits.device)
    if tensors.global_scale is not None:
        factor = factor * tensors.global_scale.to(logits.dtype)
    weights, shared = weights * factor, shared * factor
    if tensors.per_expert_scale is not None:
        weights = weights * tensors.per_expert_scale.to(logits.dtype)[ids]
    return weights, shared
