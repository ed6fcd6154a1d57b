"""Random gates and inputs for any spec: what a model without its checkpoint is tried and timed on.

Everything is drawn on the CPU, so that a seed means the same numbers on every device of a machine. (PyTorch
does not promise them across its versions and kinds of CPU.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.gate import Gate
from moegate.routing import RouterTensors, inputs_of
from moegate.spec import RouterSpec

VOCABULARY = 4096
"""Rows of a random hash table; a real one has some 130,000."""

_TENSORS, _HIDDEN, _TOKENS = range(3)  # one stream of numbers each: equal ones would make hidden states of gate rows


def random_gate(
    spec: RouterSpec, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> Gate:
    """A frozen gate of `random_tensors`."""
    weight, tensors = random_tensors(spec, seed, device, dtype)
    return Gate(spec, weight, **tensors._asdict(), frozen=True)


def random_tensors(
    spec: RouterSpec, seed: int = 0, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, RouterTensors]:
    """A weight and the small tensors that the spec asks for, in the sizes that trained gates have.

    The logits of `random_hidden` have a standard deviation of about 1, correction biases one of 0.02 (for
    softmax scores, which are much smaller than 1, of 2 % of the mean score).

    Args:
        spec: What the router computes.
        seed: The same seed gives the same tensors.
        device: Where they go.
        dtype: Of the weight, unless the spec pins it to float32, and of the linear bias and the scales.
    """
    numbers = _generator(seed, _TENSORS)

    bias_std = 0.02 / spec.num_selectable if spec.scoring_func == "softmax" else 0.02
    # The input norm has the factor K**-0.5 in it already.
    weight_std = 1.0 if spec.input_norm_eps is not None else spec.hidden_size**-0.5
    means = dict.fromkeys(("input_scale", "per_expert_scale", "global_scale"), 1.0)
    stds = {"weight": weight_std, "e_score_correction_bias": bias_std}
    made: dict[str, Tensor | None] = {}
    for wanted in inputs_of(spec):
        name = wanted.name
        if not wanted.is_needed:
            made[name] = None
        elif name == "tid2eid":
            made[name] = _hash_table(spec, numbers).to(device)
        else:
            numbers_of = torch.randn(wanted.shape, generator=numbers)  # type: ignore[arg-type]
            numbers_of = numbers_of * stds.get(name, 0.1) + means.get(name, 0.0)
            made[name] = numbers_of.to(dtype if dtype in wanted.dtypes else torch.float32).to(device)
    weight = made.pop("weight")
    assert weight is not None
    return weight, RouterTensors(**made)


def random_hidden(
    spec: RouterSpec,
    num_tokens: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Normal hidden states [num_tokens, hidden_size]."""
    shape = (num_tokens, spec.hidden_size)
    return torch.randn(shape, generator=_generator(seed, _HIDDEN), dtype=dtype).to(device)


def random_input_ids(
    num_tokens: int, seed: int = 0, device: torch.device | str = "cpu", vocabulary: int = VOCABULARY
) -> Tensor:
    """Token ids [num_tokens], int64, for hash routing."""
    return torch.randint(vocabulary, (num_tokens,), generator=_generator(seed, _TOKENS)).to(device)


def _hash_table(spec: RouterSpec, numbers: torch.Generator) -> Tensor:
    """[VOCABULARY, top_k] int64: distinct experts for each token id."""
    order = torch.rand(VOCABULARY, spec.num_experts, generator=numbers).argsort(dim=-1)
    return order[:, : spec.top_k].contiguous()


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(3 * seed + stream)
