"""Hidden states for a gate: random ones, and separated ones, whose best experts no rounding can swap."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.routing import RouterTensors
from moegate.spec import RouterSpec

_INVERSE = {"sigmoid": torch.logit, "sqrtsoftplus": lambda score: torch.log(torch.expm1(score.square()))}


def random_hidden(spec: RouterSpec, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
    """[tokens, K]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, spec.hidden_size, generator=generator).to(dtype)


def separated_hidden(spec: RouterSpec, weight: Tensor, tensors: RouterTensors, tokens: int, seed: int) -> Tensor:
    """[tokens, K] bfloat16: the keys of each token's k + 2 best experts, chosen at random, are well apart.

    With select_per_group: the keys of one expert more than are chosen of each group.

    With logits in bfloat16, random tokens have many ties, and which of two tied experts a `topk` chooses is no property
    of a model. So the logits are drawn first; the hidden state is the smallest one with these logits, W^T (W W^T)^-1
    logits.
    """
    generator = torch.Generator().manual_seed(seed)
    if spec.scoring_func in _INVERSE:
        bias = tensors.e_score_correction_bias
        bias = torch.zeros(spec.num_selectable) if bias is None else bias
        logits = _logits_of_separated_keys(spec, bias.double(), tokens, generator)
    else:
        logits = _separated_logits(spec, tokens, generator)
    if tensors.bias is not None:
        logits = logits - tensors.bias.double()
    wide = weight.double()
    hidden = torch.linalg.solve(wide @ wide.T, logits.T).T @ wide
    if tensors.input_scale is not None:
        hidden = hidden / tensors.input_scale.double()  # the norm of the gate keeps the ratios of the logits
    rounded: Tensor = hidden.to(torch.bfloat16)
    return rounded


def _num_best(spec: RouterSpec) -> int:
    if not spec.select_per_group:
        return min(spec.top_k + 2, spec.num_selectable)
    return min(spec.top_k + spec.n_group, spec.num_selectable)


def _is_left(spec: RouterSpec, order: Tensor) -> Tensor:
    """Orders [tokens, E] -> True for experts that are not among the first of their group."""
    if not spec.select_per_group:
        return torch.zeros_like(order, dtype=torch.bool)
    ranks: Tensor = order.unflatten(-1, (spec.n_group, -1)).argsort(dim=-1).argsort(dim=-1)
    return (ranks >= _num_best(spec) // spec.n_group).flatten(1)


def _separated_logits(spec: RouterSpec, tokens: int, generator: torch.Generator) -> Tensor:
    """Best logits that descend from 4..7 in steps of 1/16 to 1/8 of themselves, which are 8 to 32 bfloat16 ulps."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    experts, best = spec.num_selectable, _num_best(spec)
    steps = 1 - (1 + uniform(tokens, best)) / 16
    values = (4 + 3 * uniform(tokens, 1)) * steps.cumprod(dim=-1)
    rest = -2 + (0.8 * values[:, -1:] + 2) * uniform(tokens, experts - best)
    order = (uniform(tokens, experts) + 2 * _is_left(spec, uniform(tokens, experts))).argsort(dim=-1)
    return torch.empty(tokens, experts, dtype=torch.float64).scatter(1, order, torch.cat([values, rest], dim=-1))


def _logits_of_separated_keys(spec: RouterSpec, bias: Tensor, tokens: int, generator: torch.Generator) -> Tensor:
    """Logits whose keys (score plus bias) descend from 0.8 in steps of 0.02 to 0.035; other keys are below 0.42."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    best = _num_best(spec)
    scores = 0.1 + (0.32 - bias).clamp(min=0.02) * uniform(tokens, spec.num_selectable)
    # Experts with a large bias come last, since no score below 1 gives them such a key.
    order = uniform(tokens, spec.num_selectable) + 2 * (bias.abs() > 0.15)
    order = (order + 4 * _is_left(spec, order)).argsort(dim=-1)[:, :best]
    steps = 0.02 + 0.015 * uniform(tokens, best)
    if spec.select_per_group:
        steps = steps * min(1, 10 / best)  # one expert more in each group can be more than two in all
    keys = 0.8 - steps.cumsum(dim=-1)
    logits = _INVERSE[spec.scoring_func](scores.scatter(1, order, keys - bias[order]))
    if spec.logit_softcapping is not None:
        logits = spec.logit_softcapping * torch.atanh(logits / spec.logit_softcapping)
    return logits / spec.logit_multiplier
