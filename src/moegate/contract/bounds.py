"""The error bounds of docs/contract.md, in float64: how far a backend may be from the exact result.

All bounds are in units of u = 2**-24, float32's unit roundoff.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moegate.contract.limits import FLOAT32_MAX, least_sum
from moegate.contract.reference import (
    choice_keys,
    finite_logits,
    group_sums,
    last_sum,
    normed_input,
    scores_of,
    transformed,
)
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec

U = 2.0**-24
BFLOAT16_U = 2.0**-8
SMALLEST_NORMAL = 2.0**-126
_NORM_ERROR = 16 * U  # of the RMS norm: a mean, a reciprocal root and three multiplications; 4 u in practice
_FUNCTION_ERROR = 16 * U  # of exp, tanh or log1p, with a sum or a root behind: 8 ulp together
_DTYPE_ROUNDING = {"float32": U, "bfloat16": BFLOAT16_U, "float16": 2.0**-11}
_DTYPE_SMALLEST = {"float32": SMALLEST_NORMAL, "bfloat16": SMALLEST_NORMAL, "float16": 2.0**-24}


class Interval(NamedTuple):
    """The interval in which a backend's values must lie."""

    low: Tensor
    high: Tensor


def logit_bound(hidden: Tensor, weight: Tensor, exact: Tensor, spec: RouterSpec, tensors: RouterTensors) -> Tensor:
    """The error allowed for each logit [M, R], float64; `exact` are the logits before the rounding of the spec.

    The bound is 4 sqrt(K) u sum_i |x_i w_i|. A float32 sum of K products in any order is off by about sqrt(K) u times
    the same sum, with high probability (Higham and Mary, SIAM J. Sci. Comput. 41, 2019). The factor 4 leaves room for
    tensor cores, which add 16 products at a time and truncate.
    """
    x = normed_input(hidden, spec, tensors, torch.float64)
    magnitude = x.abs() @ weight.double().abs().T
    # Outside of this range, which no model comes near, float32 products may underflow or overflow.
    magnitude = magnitude.clamp(min=2.0**-60)
    magnitude = magnitude.masked_fill(magnitude > 2.0**60, torch.inf)
    bound: Tensor = 4 * spec.hidden_size**0.5 * U * magnitude + _lost_terms(hidden, weight)
    if spec.input_norm_eps is not None:
        bound = bound + _NORM_ERROR * magnitude
        bound = bound.masked_fill(hidden.double().abs().amax(dim=-1, keepdim=True) > 2.0**60, torch.inf)
        assert tensors.input_scale is not None
        scaled = weight.double() * tensors.input_scale.double()
        bound = bound.masked_fill(scaled.abs().amax(dim=-1) > 2.0**127, torch.inf)
    if tensors.bias is not None:
        bound = bound + 4 * U * tensors.bias.double().abs()
    if spec.logits_dtype == "bfloat16":
        bound = bound + BFLOAT16_U * (exact.abs() + bound)
    return bound


def _lost_terms(hidden: Tensor, weight: Tensor) -> Tensor:
    """The error [M, R] of float32 elements as sums of bfloat16 terms, in which everything below 2**-126 may be lost.

    An element beyond 2**127, whose first term may overflow, has no bound.
    """
    lost = torch.zeros(len(hidden), len(weight), dtype=torch.float64, device=hidden.device)
    for split, other in ((hidden, weight.T), (weight, hidden.T)):
        if split.dtype == torch.float32:
            of_one = SMALLEST_NORMAL * other.double().abs().sum(dim=0)
            of_pair = of_one + torch.zeros(len(split), 1, dtype=torch.float64, device=split.device)
            of_pair = of_pair.masked_fill(split.double().abs().amax(dim=-1, keepdim=True) > 2.0**127, torch.inf)
            lost = lost + (of_pair if split is hidden else of_pair.T)
    return lost


def score_interval(logits: Tensor, spec: RouterSpec, logit_error: Tensor) -> Interval:
    """The scores [M, E] that a backend may have for finite, transformed logits, each off by up to logit_error."""
    scores = scores_of(logits, spec)
    if spec.scoring_func == "identity":
        slack = logit_error + transform_error(logits, spec)
        return Interval(scores - slack, scores + slack)
    if spec.scoring_func == "softmax":
        argument = logits - logits.amax(dim=-1, keepdim=True)
        logit_error = logit_error + transform_error(logits, spec)
        spread = logit_error + logit_error.amax(dim=-1, keepdim=True)
        low, high = scores * torch.exp(-spread), scores * torch.exp(spread.clamp(max=60))
    else:
        argument = logits
        logit_error = logit_error + transform_error(logits, spec)
        low, high = scores_of(logits - logit_error, spec), scores_of(logits + logit_error, spec)
    # exp(a (1 + u)) = exp(a) (1 + a u): the relative error scales with the argument. It is clamped at 128, since
    # e**-104 is already below float32's smallest number.
    relative = _FUNCTION_ERROR + 2 * U * argument.abs().clamp(max=128)
    underflow = SMALLEST_NORMAL**0.5 if spec.scoring_func == "sqrtsoftplus" else SMALLEST_NORMAL
    return Interval((low * (1 - relative) - underflow).clamp(min=0), high * (1 + relative) + underflow)


def transform_error(logits: Tensor, spec: RouterSpec) -> Tensor:
    """The error of the multiplier and the soft cap, for transformed logits."""
    if spec.logit_multiplier == 1.0 and spec.logit_softcapping is None:
        return torch.zeros_like(logits)
    cap = spec.logit_softcapping or 0.0
    return _FUNCTION_ERROR * logits.abs() + 2 * U * cap


def key_interval(logits: Tensor, spec: RouterSpec, tensors: RouterTensors, logit_error: Tensor) -> Interval:
    """The keys [M, E] that a backend may have for logits [M, R], each off by up to logit_error [M, R]."""
    finite = finite_logits(logits, torch.float64)[:, : spec.num_selectable]
    logit_error = logit_error[:, : spec.num_selectable]
    if spec.selects_on_logits:
        return Interval(finite - logit_error, finite + logit_error)
    keys = choice_keys(finite, spec, tensors)
    scored = transformed(finite, spec)
    if spec.correction_bias == "logit":
        slack = logit_error * spec.logit_multiplier + transform_error(scored, spec)
        low, high = scored - slack, scored + slack
    else:
        low, high = score_interval(scored, spec, logit_error * spec.logit_multiplier)
    if spec.correction_bias is not None:
        assert tensors.e_score_correction_bias is not None
        bias = finite_logits(tensors.e_score_correction_bias, torch.float64)
        low, high = low + bias, high + bias
    rounding = 2 * U * keys.abs() + SMALLEST_NORMAL
    exact = keys.abs() == FLOAT32_MAX  # saturated keys are not rounded
    return Interval(torch.where(exact, keys, low - rounding), torch.where(exact, keys, high + rounding))


def group_interval(keys: Interval, spec: RouterSpec) -> Interval:
    """The group scores [M, n_group] that a backend may have.

    Each addition rounds its own sum. Where keys of both signs cancel, an earlier sum may be far larger than the score,
    and so may its rounding.
    """
    ends = []
    for end, side in ((keys.low, -1), (keys.high, 1)):
        sums = group_sums(end, spec)
        rounding = 2 * U * sums.abs()
        rounding[..., 0] = 0  # the best key alone is not rounded
        before = rounding.cumsum(dim=-1).roll(1, dims=-1)
        before[..., 0] = 0
        score = last_sum(sums + side * before)
        ends.append(score + side * 2 * U * score.abs())
    return Interval(*ends)


def weight_interval(
    ids: Tensor, logits: Tensor, spec: RouterSpec, tensors: RouterTensors, logit_error: Tensor
) -> tuple[Interval, Interval]:
    """The weights [M, k] that a backend may return for its ids, and the shared weights [M, num_shared_gates]."""
    scored = transformed(finite_logits(logits, torch.float64), spec)
    logit_error = logit_error * spec.logit_multiplier
    selected, error = scored.gather(-1, ids), logit_error.gather(-1, ids)
    shared = Interval(scored[:, :0], scored[:, :0])
    if spec.softmax_over_selected:
        weights = score_interval(selected, _SOFTMAX, error + transform_error(selected, spec))
    elif spec.weights_from == "sigmoid_of_selected":
        weights = score_interval(selected, _SIGMOID, error + transform_error(selected, spec))
    else:
        experts = spec.num_selectable
        all_scores = score_interval(scored[:, :experts], spec, logit_error[:, :experts])
        weights = Interval(*(end.gather(-1, ids) for end in all_scores))
        if spec.num_shared_gates:
            shared = score_interval(scored[:, experts:], spec, logit_error[:, experts:])
    if spec.renormalize and not spec.softmax_over_selected:
        total = Interval(*(_total(*ends, spec) for ends in zip(weights, shared, strict=True)))
        weights, shared = (Interval(each.low / total.high, each.high / total.low) for each in (weights, shared))
    return _scaled(weights, ids, spec, tensors), _scaled(shared, None, spec, tensors)


_SOFTMAX = RouterSpec(hidden_size=1, num_experts=1, top_k=1, scoring_func="softmax")
_SIGMOID = RouterSpec(hidden_size=1, num_experts=1, top_k=1, scoring_func="sigmoid")


def _total(weights: Tensor, shared: Tensor, spec: RouterSpec) -> Tensor:
    total = weights.sum(dim=-1, keepdim=True) + shared.sum(dim=-1, keepdim=True) + spec.renormalize_eps
    return total.clamp(min=least_sum(spec))


def _scaled(weights: Interval, ids: Tensor | None, spec: RouterSpec, tensors: RouterTensors) -> Interval:
    """Multiplies by the factors, and widens by the rounding of the sum, of the multiplications and of the dtype."""
    factor = torch.tensor(spec.routed_scaling_factor, dtype=torch.float64, device=weights.low.device)
    if tensors.global_scale is not None:
        factor = factor * tensors.global_scale.double()
    ends = _overflowing(torch.stack([weights.low * factor, weights.high * factor]))
    if ids is not None and tensors.per_expert_scale is not None:
        ends = _overflowing(ends * tensors.per_expert_scale.double()[ids])
    rounding = 8 * U + spec.top_k * U + 2 * _DTYPE_ROUNDING[spec.topk_weights_dtype]
    slack = ends.abs().amax(dim=0) * rounding + _DTYPE_SMALLEST[spec.topk_weights_dtype]
    return Interval(ends.amin(dim=0) - slack, ends.amax(dim=0) + slack)


def _overflowing(products: Tensor) -> Tensor:
    """Replaces values that overflow in float32 by values so large that no later factor makes them finite again."""
    return torch.where(products.abs() > FLOAT32_MAX, products.sign() * 1e200, products)
