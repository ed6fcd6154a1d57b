"""A router in tensor operations, as an inference engine writes one: no promise about ties or NaN.

The functions are made for `torch.compile`: all branches on the spec are decided outside of the compiled function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moegate.routing import RouterTensors
from moegate.spec import RouterSpec

Chosen = tuple[Tensor, Tensor]
"""topk_ids int32 and topk_weights float32, each [M, k]; weights of shared gates behind them."""


def plain_logits(spec: RouterSpec, tensors: RouterTensors) -> Callable[[Tensor, Tensor], Tensor]:
    """(hidden [M, K], weight [R, K]) -> logits [M, R] by cuBLAS, in a single call where cuBLAS has one."""
    bias, scale, eps = tensors.bias, tensors.input_scale, spec.input_norm_eps
    wants_float32 = spec.logits_dtype == "float32"

    def logits(hidden: Tensor, weight: Tensor) -> Tensor:
        if eps is not None and scale is not None:
            wide = hidden.float()
            normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
            # As in Transformers, the normed and scaled input is cast back to the model's dtype.
            hidden = (normed * scale.float() * hidden.shape[-1] ** -0.5).to(hidden.dtype)
        if weight.dtype != hidden.dtype:
            return F.linear(hidden.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))
        if wants_float32 and hidden.is_cuda and weight.dtype != torch.float32:
            unbiased = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
            return unbiased if bias is None else unbiased + bias
        if wants_float32:
            return F.linear(hidden.float(), weight.float(), None if bias is None else bias.float())
        return F.linear(hidden, weight, bias)

    return logits


def plain_select(spec: RouterSpec, tensors: RouterTensors, input_ids: Tensor | None) -> Callable[[Tensor], Chosen]:
    """Logits [M, R] -> topk_ids and topk_weights."""
    selectable, top_k = spec.num_selectable, spec.top_k
    shared_gates, table = spec.num_shared_gates, tensors.tid2eid
    transformed, score, masked = _transform(spec), _score(spec), _group_mask(spec)
    finish = _weights(spec, tensors)
    bias, on_logits = tensors.e_score_correction_bias, spec.selects_on_logits
    bias_on_logit = spec.correction_bias == "logit"

    def select(logits: Tensor) -> Chosen:
        logits = transformed(logits.float())
        rows = logits[:, :selectable]
        scores = score(rows)
        if table is not None and input_ids is not None:
            ids = table[input_ids].long()
        else:
            keys = rows if on_logits or bias_on_logit else scores
            keys = keys if bias is None else keys + bias
            ids = torch.topk(masked(keys), top_k, dim=-1).indices
        shared = score(logits[:, selectable:]) if shared_gates else None
        return ids.to(torch.int32), finish(ids, rows, scores, shared)

    return select


def plain_route(
    spec: RouterSpec, tensors: RouterTensors, input_ids: Tensor | None
) -> Callable[[Tensor, Tensor], Chosen]:
    """(hidden [M, K], weight [R, K]) -> topk_ids and topk_weights."""
    logits, select = plain_logits(spec, tensors), plain_select(spec, tensors, input_ids)

    def route(hidden: Tensor, weight: Tensor) -> Chosen:
        return select(logits(hidden, weight))

    return route


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` as one graph in the default mode; the second number of tokens makes the shapes dynamic."""
    result: Callable[..., Any] = torch.compile(function, fullgraph=True)
    return result


def _transform(spec: RouterSpec) -> Callable[[Tensor], Tensor]:
    multiplier, cap = spec.logit_multiplier, spec.logit_softcapping

    def transform(logits: Tensor) -> Tensor:
        if multiplier != 1.0:
            logits = logits * multiplier
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


def _score(spec: RouterSpec) -> Callable[[Tensor], Tensor]:
    name = spec.scoring_func

    def score(logits: Tensor) -> Tensor:
        if name == "softmax":
            return torch.softmax(logits, dim=-1)
        if name == "sigmoid":
            return torch.sigmoid(logits)
        if name == "sqrtsoftplus":
            return F.softplus(logits).sqrt()
        assert name == "identity", name
        return logits

    return score


def _group_mask(spec: RouterSpec) -> Callable[[Tensor], Tensor]:
    groups, kept, ranked_by = spec.n_group, spec.topk_group, spec.num_group_score_keys
    if spec.select_per_group:
        return _best_of_each(groups, spec.top_k // groups)

    def masked(keys: Tensor) -> Tensor:
        if groups == 1:
            return keys
        grouped = keys.view(keys.shape[0], groups, -1)
        ranks = grouped.amax(-1) if ranked_by == 1 else grouped.topk(ranked_by, dim=-1).values.sum(-1)
        best = torch.topk(ranks, kept, dim=-1, sorted=False).indices
        mask = torch.zeros_like(ranks).scatter_(1, best, 1.0).bool()
        return grouped.masked_fill(~mask.unsqueeze(-1), float("-inf")).view(keys.shape)

    return masked


def _best_of_each(groups: int, per_group: int) -> Callable[[Tensor], Tensor]:
    def masked(keys: Tensor) -> Tensor:
        grouped = keys.view(keys.shape[0], groups, -1)
        values, places = torch.topk(grouped, per_group, dim=-1)
        return torch.full_like(grouped, float("-inf")).scatter_(-1, places, values).view(keys.shape)

    return masked


def _weights(spec: RouterSpec, tensors: RouterTensors) -> Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """(ids, logits, scores, shared scores) -> weights [M, k + shared]."""
    source, renormalize = spec.weights_from, spec.renormalize
    eps, floor, factor = spec.renormalize_eps, spec.renormalize_floor, spec.routed_scaling_factor
    global_scale, per_expert = tensors.global_scale, tensors.per_expert_scale

    def weights(ids: Tensor, logits: Tensor, scores: Tensor, shared: Tensor | None) -> Tensor:
        picked = (scores if source == "score" else logits).gather(-1, ids.long())
        if source == "softmax_of_selected":
            picked = torch.softmax(picked, dim=-1)
        elif source == "sigmoid_of_selected":
            picked = torch.sigmoid(picked)
        if shared is not None:
            picked = torch.cat([picked, shared], dim=-1)
        if renormalize:
            total = picked.sum(-1, keepdim=True) + eps
            picked = picked / (total.clamp(min=floor) if floor else total)
        picked = picked * factor
        if global_scale is not None:
            picked = picked * global_scale.float()
        return picked if per_expert is None else picked * per_expert.float()[ids.long()]

    return weights
