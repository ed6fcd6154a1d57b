"""docs/contract.md, 4.7: rows that are padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_device import back, gate_there, select, there
from routers import SPECS, generator, random_logits, route_arguments, select_arguments, tensors_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import moegate
from moegate import RouterSpec, Routing
from moegate.contract import reference
from moegate.contract.verify import verify_call, verify_routing

# A mask as vLLM has it, and the number of rows that are no padding, as SGLang has it.
FORMS = ("mask", "number", "number [1]")


def a_padding(form: str, rows: int) -> Tensor:
    if form == "mask":
        return torch.arange(rows) % 3 == 1
    number = torch.tensor(rows - rows // 3, dtype=torch.int32)
    return number if form == "number" else number.view(1)


def is_padding(padding: Tensor, rows: int) -> Tensor:
    return padding if padding.dtype == torch.bool else torch.arange(rows) >= padding


def assert_padded(routing: Routing, mask: Tensor) -> None:
    assert routing.topk_ids[mask].eq(-1).all()
    for part in (routing.topk_weights, routing.shared_weights, routing.identity_weight):
        assert part is None or part[mask].eq(0).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SPECS)
def test_rows_of_padding(name: str, form: str) -> None:
    """They have id -1 and weight 0; the other rows and all logits have the bits of a call without padding."""
    spec = SPECS[name]
    weight = torch.randn(spec.num_gate_rows, spec.hidden_size, generator=generator(3))
    for rows in (1, 5, 40, 150, 700):
        tensors = tensors_of(spec)
        given = route_arguments(spec, tensors, rows)
        ids = given.pop("input_ids", None)
        gate = gate_there(spec, weight, **given)
        hidden = torch.randn(rows, spec.hidden_size, generator=generator(rows))
        padding = a_padding(form, rows)
        without = gate(there(hidden), input_ids=there(ids), return_logits=True)
        out = Routing(*(None if part is None else _poisoned(part) for part in without))  # type: ignore[arg-type]
        got = gate(there(hidden), input_ids=there(ids), padding=there(padding), return_logits=True, out=out)
        assert got.topk_ids is out.topk_ids
        got, without = back(got), back(without)
        mask = is_padding(padding, rows)
        assert_padded(got, mask)
        assert got.logits is not None
        assert without.logits is not None
        assert got.logits.equal(without.logits)
        for mine, theirs in zip(got, without, strict=True):
            assert mine is None or theirs is None or mine[~mask].equal(theirs[~mask])
        assert verify_call(got, hidden, weight, spec, tensors, ids, padding).problems == []
        assert verify_call(without, hidden, weight, spec, tensors, ids, padding).ok == (not mask.any())


def _poisoned(part: Tensor) -> Tensor:
    return torch.full_like(part, torch.nan if part.is_floating_point() else 77)


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("name", SPECS)
def test_what_padding_holds_does_not_matter(name: str, rows: int) -> None:
    """NaN logits and token ids outside of the table, which are an error or NaN in a token's row."""
    spec, tensors = SPECS[name], tensors_of(SPECS[name])
    logits, given = random_logits(spec, rows), select_arguments(spec, tensors, rows)
    mask = a_padding("mask", rows)
    expected = select(logits, spec, **given, padding=mask)
    logits[mask] = torch.nan
    if spec.hash_routing:
        given["input_ids"] = given["input_ids"].masked_fill(mask, 10**9)
    got = select(logits, spec, **given, padding=mask)
    assert_padded(got, mask)
    for mine, theirs in zip(got, expected, strict=True):
        assert mine is theirs or (mine is not None and theirs is not None and mine.equal(theirs))
    oracle = reference.select(logits, spec, tensors, given.get("input_ids"), padding=mask)
    assert_padded(oracle, mask)
    problems = verify_routing(got, logits, spec, tensors, input_ids=given.get("input_ids"), padding=mask).problems
    assert problems == []


@pytest.mark.parametrize("number", [-(2**31), -1, 0, 1, 6, 7, 2**31 - 1])
def test_any_number_of_rows(number: int) -> None:
    spec, logits = SPECS["softmax"], random_logits(SPECS["softmax"], 6)
    mask = torch.arange(6) >= number
    expected = select(logits, spec, padding=mask)
    got = select(logits, spec, padding=torch.tensor(number, dtype=torch.int32))
    assert got.topk_ids.equal(expected.topk_ids)
    assert got.topk_weights.equal(expected.topk_weights)
    assert got.topk_ids.eq(-1).any(dim=-1).equal(mask)


@pytest.mark.parametrize(
    ("padding", "error", "words"),
    [
        ([False] * 4, TypeError, "padding: got list; allowed: a torch.Tensor"),
        (torch.zeros(4), TypeError, "padding: got dtype float32; allowed: bool, int32"),
        (torch.tensor(4), TypeError, "padding: got dtype int64; allowed: bool, int32"),
        (torch.zeros(5, dtype=torch.bool), ValueError, r"padding: got shape \[5\]; allowed: \[4\]"),
        (torch.zeros(4, 1, dtype=torch.bool), ValueError, r"padding: got shape \[4, 1\]; allowed: \[4\]"),
        (torch.tensor(True), ValueError, r"padding: got shape \[\]; allowed: \[4\]"),
        (torch.zeros(4, dtype=torch.int32), ValueError, r"padding: got shape \[4\]; allowed: \[1\]"),
        (torch.zeros(8, dtype=torch.bool)[::2], ValueError, r"padding: got strides \[2\]"),
        (torch.zeros(4, dtype=torch.bool, device="meta"), ValueError, "padding: got device meta"),
    ],
    ids=str,
)
def test_what_is_no_padding(padding: Any, error: type[Exception], words: str) -> None:
    spec = RouterSpec(16, 8, 2)
    weight, hidden = torch.zeros(8, 16), torch.zeros(4, 16)
    gate = gate_there(spec, weight)
    for call in (
        lambda: gate(there(hidden), padding=there(padding)),
        lambda: moegate.route(there(hidden), there(weight), spec, padding=there(padding)),
        lambda: moegate.select(there(torch.zeros(4, 8)), spec, padding=there(padding)),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("form", FORMS)
def test_a_trace_holds_for_other_padding(form: str) -> None:
    spec, logits = SPECS["sigmoid with shared gates"], random_logits(SPECS["sigmoid with shared gates"], 40)
    given = {name: there(part) for name, part in select_arguments(spec, tensors_of(spec), 40).items()}

    def run(logits: Tensor, padding: Tensor) -> Routing:
        return moegate.select(logits, spec, **given, padding=padding)

    traced = make_fx(run)(there(logits), there(a_padding(form, 40)))
    other = ~a_padding(form, 40) if form == "mask" else a_padding(form, 40) - 9
    got, expected = back(traced(there(logits), there(other))), back(run(there(logits), there(other)))
    assert got.topk_ids.equal(expected.topk_ids)
    torch.testing.assert_close(got.topk_weights, expected.topk_weights, rtol=1e-5, atol=0)  # other operations of exp
    assert_padded(got, is_padding(other, 40))


def test_vmap() -> None:
    spec, logits = SPECS["softmax"], torch.stack([random_logits(SPECS["softmax"], 6, seed) for seed in range(3)])
    numbers = torch.tensor([0, 2, 6], dtype=torch.int32)

    def run(logits: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        return moegate.select(logits, spec, padding=padding)[:2]

    ids, _ = torch.vmap(run)(there(logits), there(numbers))
    for each, some, number in zip(ids.cpu(), logits, numbers, strict=True):
        assert each.equal(select(some, spec, padding=number).topk_ids)
