"""docs/contract.md, section 3: the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from on_device import select
from routers import SPECS, generator, random_logits, select_arguments, tensors_of, token_ids
from torch import Tensor

from moegate import RouterSpec
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors, Routing

LOGIT_KEYED = [name for name, spec in SPECS.items() if spec.selects_on_logits and not spec.hash_routing]
MANY = 40  # more rows than the torch backend's path for few rows takes
GROUPED = RouterSpec(64, 8, 2, "sigmoid", "score", n_group=4, topk_group=2)


def ids_of(logits: Tensor, spec: RouterSpec, bias: Tensor | None = None, rows: int = 1) -> list[int]:
    """The ids of one row of logits; asserts that they are the same alone, among many rows, and beside a NaN row."""
    alone = select(logits[None], spec, e_score_correction_bias=bias).topk_ids
    many = select(logits.expand(MANY, -1), spec, e_score_correction_bias=bias).topk_ids
    with_nan = torch.cat([logits[None], torch.full_like(logits[None], torch.nan)])
    careful = select(with_nan, spec, e_score_correction_bias=bias).topk_ids[0]
    assert (many == alone).all()
    assert careful.equal(alone[0])
    return alone[0].tolist()


def by_hand(keys: list[float], k: int) -> list[int]:
    return sorted(range(len(keys)), key=lambda e: (-keys[e], e))[:k]


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOGIT_KEYED)
def test_choice_on_logits_is_exact(name: str, dtype: torch.dtype, rows: int) -> None:
    """Ids and order are exact, on logits so coarse that most rows have ties."""
    spec = SPECS[name]
    logits = (random_logits(spec, rows) * 8).round().to(dtype) / 8
    got = select(logits, spec, **select_arguments(spec, tensors_of(spec), rows)).topk_ids.tolist()
    if spec.n_group == 1:
        assert got == [by_hand(row, spec.top_k) for row in logits[:, : spec.num_selectable].tolist()]
    routing = select(logits, spec, **select_arguments(spec, tensors_of(spec), rows))
    assert verify_routing(routing, logits, spec, tensors_of(spec)).problems == []


def test_saturated_scores_do_not_tie() -> None:
    """Both sigmoids are 1.0 in float32, both softmax entries 0.0, but the logits differ."""
    assert ids_of(torch.tensor([20.0, 30.0, 25.0]), RouterSpec(8, 3, 2, "sigmoid")) == [1, 2]
    assert ids_of(torch.tensor([-900.0, -800.0, 0.0]), RouterSpec(8, 3, 2, "softmax")) == [2, 1]


def test_groups() -> None:
    keys = torch.tensor([[0.9, 0.0], [0.5, 0.6], [0.8, 0.2], [0.3, 0.3]]).flatten()
    logits = torch.zeros(8)  # every sigmoid is 1/2, so the bias is the key
    assert ids_of(logits, GROUPED, keys) == [4, 3]  # sums 0.9, 1.1, 1.0, 0.6
    assert ids_of(logits, replace(GROUPED, group_score="max"), keys) == [0, 4]
    by_max = RouterSpec(64, 8, 2, n_group=4, topk_group=2, group_score="max")
    assert ids_of(keys, by_max) == [0, 4]
    assert ids_of(keys, replace(by_max, topk_group=1)) == [0, 1]


def test_equal_groups() -> None:
    logits = torch.zeros(8)
    keys = torch.tensor([[0.1, 0.1], [0.4, 0.3], [0.3, 0.4], [0.3, 0.4]]).flatten()
    assert ids_of(logits, GROUPED, keys) == [2, 5]  # groups 1 and 2, the lowest of three equal ones
    assert ids_of(logits, GROUPED, torch.zeros(8)) == [0, 1]


def test_two_equal_keys_count_twice() -> None:
    keys = torch.tensor([[0.5, 0.5], [0.6, 0.3], [0.5, 0.5], [0.6, 0.3]]).flatten()
    assert ids_of(torch.zeros(8), GROUPED, keys) == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_experts", [7, 60, 256, 1024])
def test_ties_go_to_the_lowest_id(num_experts: int, dtype: torch.dtype) -> None:
    k = min(7, num_experts)
    spec = RouterSpec(8, num_experts, k)
    assert ids_of(torch.full((num_experts,), -0.75, dtype=dtype), spec) == list(range(k))
    logits = torch.zeros(num_experts, dtype=dtype)
    logits[-1], logits[-2], logits[2] = 1, 1, -1  # the last two lead, the border ties
    assert ids_of(logits, spec)[:2] == [num_experts - 2, num_experts - 1]
    assert ids_of(logits, spec) == by_hand(logits.tolist(), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_of_both_signs_tie(dtype: torch.dtype) -> None:
    logits = torch.tensor([-1.0, -0.0, 0.0, -0.0, 1e-30], dtype=dtype)
    assert ids_of(logits, RouterSpec(8, 5, 4)) == [4, 1, 2, 3]
    assert ids_of(torch.zeros(5), RouterSpec(8, 5, 4, "identity", "logit"), logits.float()) == [4, 1, 2, 3]


@pytest.mark.parametrize("groups", [(1, 1), (8, 4)], ids=str)
def test_keys_exact_by_construction_agree_exactly(groups: tuple[int, int]) -> None:
    """Sigmoids of exactly 0, 1/2 and 1 plus a coarse bias: many ties, and one right answer."""
    spec = RouterSpec(8, 64, 8, "sigmoid", "score", *groups)
    g = generator(3)
    scores = torch.randint(0, 3, (200, 64), generator=g) / 2
    logits = torch.tensor([-200.0, 0.0, 40.0])[(scores * 2).long()]
    bias = torch.randint(-3, 4, (64,), generator=g) / 4
    got = select(logits, spec, e_score_correction_bias=bias).topk_ids
    keys = scores + bias
    if groups[0] > 1:
        sums = keys.view(200, 8, 8).topk(2).values.sum(-1).tolist()
        kept = torch.zeros(200, 8, dtype=torch.bool)
        for row, total in enumerate(sums):
            kept[row, by_hand(total, 4)] = True
        keys = keys.masked_fill(~kept.repeat_interleave(8, 1), -torch.inf)
    assert got.tolist() == [by_hand(row, 8) for row in keys.tolist()]


def test_the_margin_excuses_ulps_and_no_more() -> None:
    """The verdict on two swapped experts whose keys are equal, differ within the margin, and beyond."""
    spec = RouterSpec(8, 3, 1, "sigmoid", "score")
    logits = torch.zeros(3, 3)
    bias = torch.tensor([0.5, 0.5 - 2**-22, 0.5 - 2**-18])
    tensors = RouterTensors(e_score_correction_bias=bias)

    def verdict(choice: int) -> tuple[int, list[str]]:
        ids = torch.full((3, 1), choice, dtype=torch.int32)
        found = verify_routing(Routing(ids, torch.full((3, 1), 0.5)), logits, spec, tensors)
        return found.excused_rows, found.problems

    assert verdict(0) == (0, [])
    assert verdict(1) == (3, [])
    assert verdict(2)[1] == ["an expert chosen before one with a larger key in 3 of 3 rows, first row 0"]


def test_hash_ids_are_the_table() -> None:
    spec = SPECS["hash"]
    tensors = tensors_of(spec)
    assert tensors.tid2eid is not None
    got = select(random_logits(spec, 20), spec, **select_arguments(spec, tensors, 20)).topk_ids
    assert got.equal(tensors.tid2eid[token_ids(20)])
