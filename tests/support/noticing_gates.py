"""Gates for the tests of noticing, and a comparison with new gates."""

from __future__ import annotations

import pytest
import torch
from on_device import gate_there, there
from routers import SPECS, generator, tensors_of, token_ids
from torch import Tensor, nn

from moegate import Gate, RouterSpec
from moegate.choice.dispatch import Dispatch
from moegate.halves import Half, Prepared
from moegate.routing import RouterTensors

SPEC = SPECS["sigmoid with bias in groups"]
PINNED = SPECS["softmax with bias and floor"]
HASH = SPECS["hash"]
FROZEN = pytest.mark.parametrize("frozen", [False, True])


def weight_of(spec: RouterSpec, seed: int = 1) -> Tensor:
    dtype = torch.float32 if spec.weight_dtype == "float32" else torch.bfloat16
    return torch.randn(spec.num_gate_rows, spec.hidden_size, generator=generator(seed)).to(dtype)


def a_gate(spec: RouterSpec = SPEC, *, frozen: bool = False) -> Gate:
    given = {name: part for name, part in tensors_of(spec)._asdict().items() if part is not None}
    return gate_there(spec, weight_of(spec), **given, frozen=frozen)


HIDDEN = there(torch.randn(5, 64, generator=generator(2)).bfloat16())
IDS = there(token_ids(5))


def routed_as(gate: Gate, **given: Tensor) -> bool:
    """True if the gate routes like a new gate with the same tensors."""
    names = ("bias", "e_score_correction_bias", "input_scale", "per_expert_scale", "global_scale", "tid2eid")
    now = {name: part for name in names if (part := getattr(gate, name)) is not None}
    expected = Gate(gate.spec, gate.weight.detach().clone(), **now, frozen=gate.frozen)(HIDDEN, **given)
    got = gate(HIDDEN, **given)
    return all(mine.equal(theirs) for mine, theirs in zip(got[:2], expected[:2], strict=True))


def record_prepared(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list to which every prepared weight is added from now on."""
    weights: list[Tensor] = []
    prepare = Dispatch.prepare

    def recorded(self: Dispatch, weight: Tensor, tensors: RouterTensors, half: Half = "both") -> Prepared:
        weights.append(weight)
        return prepare(self, weight, tensors, half)

    monkeypatch.setattr(Dispatch, "prepare", recorded)
    return weights


def write(gate: Gate, weight: Tensor) -> None:
    with torch.no_grad():
        gate.weight.copy_(weight)


def assign(gate: Gate, weight: Tensor) -> None:
    gate.weight = nn.Parameter(weight)


def set_data(gate: Gate, weight: Tensor) -> None:
    gate.weight.data = weight
