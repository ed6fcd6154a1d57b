"""Changed tensors that do not fit raise the constructor's errors."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from noticing_gates import FROZEN, HIDDEN, a_gate, routed_as
from on_device import there
from torch import nn

from moegate import Gate
from moegate.choice.dispatch import Dispatch


def _prune(gate: Gate) -> None:
    gate.weight.data = gate.weight.data[:200]  # at the same address


def _keep(gate: Gate) -> None:
    gate.weight.data = gate.weight.data[torch.arange(0, 256, 2)]


def _transpose(gate: Gate) -> None:
    gate.weight.data = gate.weight.data.T.contiguous().T


def _widen(gate: Gate) -> None:
    gate.weight.data = gate.weight.data.double()


def _as_integers(gate: Gate) -> None:
    gate._parameters["weight"] = gate.weight.data.view(torch.int16)  # type: ignore[assignment]


def _bias_as_integers_in_place(gate: Gate) -> None:
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias.data = gate.e_score_correction_bias.data.view(torch.int32)


def _weight_on_meta(gate: Gate) -> None:
    gate.weight = nn.Parameter(gate.weight.to("meta"))


def _no_bias(gate: Gate) -> None:
    gate.e_score_correction_bias = None


def _short_bias(gate: Gate) -> None:
    gate.e_score_correction_bias = gate.e_score_correction_bias[:1]  # type: ignore[index]


def _bias_cut_in_place(gate: Gate) -> None:
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias.data = gate.e_score_correction_bias.data[:255]


def _bias_spread_in_place(gate: Gate) -> None:
    assert gate.e_score_correction_bias is not None
    gate.e_score_correction_bias.data = gate.e_score_correction_bias.data[:1].expand(256)


def _bias_on_meta(gate: Gate) -> None:
    gate.e_score_correction_bias = torch.zeros(256, device="meta")


def _linear_bias(gate: Gate) -> None:
    gate.bias = nn.Parameter(there(torch.zeros(256)))


def _no_weight(gate: Gate) -> None:
    gate.weight = None  # type: ignore[assignment]


def _deleted_weight(gate: Gate) -> None:
    del gate.weight


def _number(gate: Gate) -> None:
    del gate.weight
    gate.weight = 3.0  # type: ignore[assignment]


MISFITS: list[tuple[Callable[[Gate], None], type[Exception], str]] = [
    (_prune, ValueError, r"weight: got shape \[200, 64\]; allowed: \[256, 64\]"),
    (_keep, ValueError, r"weight: got shape \[128, 64\]"),
    (_transpose, ValueError, r"weight: got strides \[1, 256\]"),
    (_widen, TypeError, "weight: got dtype float64"),
    (_as_integers, TypeError, "weight: got dtype int16"),
    (_bias_as_integers_in_place, TypeError, "e_score_correction_bias: got dtype int32"),
    (_weight_on_meta, ValueError, "e_score_correction_bias: got device"),
    (_no_bias, ValueError, "e_score_correction_bias: got None"),
    (_short_bias, ValueError, r"e_score_correction_bias: got shape \[1\]"),
    (_bias_cut_in_place, ValueError, r"e_score_correction_bias: got shape \[255\]"),
    (_bias_spread_in_place, ValueError, r"e_score_correction_bias: got strides \[0\]"),
    (_bias_on_meta, ValueError, "e_score_correction_bias: got device meta"),
    (_linear_bias, ValueError, "bias: got a tensor; allowed: None"),
    (_no_weight, TypeError, "weight: got NoneType"),
    (_deleted_weight, TypeError, "weight: got NoneType"),
    (_number, TypeError, "weight: got float"),
]


@pytest.mark.parametrize(("change", "error", "message"), MISFITS)
@FROZEN
def test_what_does_not_fit_is_an_error(
    frozen: bool,
    change: Callable[[Gate], None],
    error: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each call raises before anything runs, also of a copy of the gate; fitting tensors end the error."""
    gate = a_gate(frozen=frozen)
    gate(HIDDEN)
    change(gate)
    twin = copy.deepcopy(gate)
    monkeypatch.setattr(Dispatch, "route", lambda *_: pytest.fail("it ran"))
    for one in (gate, gate, twin):
        with pytest.raises(error, match=message):
            one(HIDDEN)
    with pytest.raises(error, match=message):
        gate.refresh()
    monkeypatch.undo()
    whole = a_gate()
    for name in ("weight", "bias", "e_score_correction_bias"):
        if hasattr(gate, name):
            delattr(gate, name)
        kind = gate.register_parameter if name != "e_score_correction_bias" else gate.register_buffer
        kind(name, getattr(whole, name))
    assert routed_as(gate)
