"""docs/contract.md, 3.2: groups ranked by the sum of j keys, and the best of each group, against plain oracles."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce

import pytest
import torch
from on_device import select
from router_inputs import random_hidden, separated_hidden
from routers import generator
from torch import Tensor

from moegate import RouterSpec, Routing
from moegate.contract.reference import select as reference_select
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors

INF, NAN, MAX = torch.inf, torch.nan, torch.finfo(torch.float32).max
ROWS = (1, 5, 16, 17, 300)  # both paths of the torch backend; incomplete blocks of the cuda backend
# E, n_group, k: groups of whole lanes of a warp and others, groups of one expert, and sizes that fill no lane.
PER_GROUP = [(64, 8, 8), (512, 8, 8), (96, 4, 12), (64, 32, 32), (7, 7, 7), (45, 5, 10), (40, 2, 32), (1024, 2, 32)]
# E, n_group, topk_group, j, k
BY_SUM = [
    (256, 8, 4, 3, 8),
    (64, 16, 3, 4, 5),
    (64, 2, 1, 32, 7),
    (45, 9, 4, 5, 6),
    (60, 6, 3, 3, 8),
    (256, 64, 5, 4, 8),
    (1024, 4, 2, 9, 32),
]


def key_on_bias(spec: RouterSpec) -> RouterSpec:
    """The same spec with keys l + b, in which only the addition is rounded."""
    return replace(spec, scoring_func="identity", correction_bias="logit", weights_from="sigmoid_of_selected")


def best_first(ids: list[int], keys: list[float]) -> list[int]:
    return sorted(ids, key=lambda expert: (-keys[expert], expert))


def per_group_by_hand(keys: list[float], n_group: int, k: int) -> list[int]:
    """The best k / n_group ids of each group, ordered by key over all groups."""
    size, chosen = len(keys) // n_group, []
    for first in range(0, len(keys), size):
        chosen += best_first(list(range(first, first + size)), keys)[: k // n_group]
    return best_first(chosen, keys)


def by_sum_by_hand(keys: Tensor, n_group: int, topk_group: int, j: int, k: int) -> list[int]:
    """Keys [E] float32: the best k ids of the groups with the largest float32 sums of j keys, added best first."""
    groups = keys.view(n_group, -1)
    sums = [float(reduce(torch.add, sorted(group, reverse=True)[:j])) for group in groups]
    kept = best_first(list(range(n_group)), sums)[:topk_group]
    size = groups.shape[1]
    ids = [group * size + place for group in kept for place in range(size)]
    return best_first(ids, keys.tolist())[:k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("experts", "n_group", "k"), PER_GROUP)
def test_the_best_of_each_group(experts: int, n_group: int, k: int, rows: int, dtype: torch.dtype) -> None:
    """On logits so coarse that most groups have ties at the border; some logits are infinite."""
    spec = RouterSpec(8, experts, k, n_group=n_group, topk_group=n_group, select_per_group=True)
    logits = (2 * torch.randn(rows, experts, generator=generator(rows))).round().to(dtype)
    logits[-1, ::3] = -INF
    logits[0, 1::5] = INF
    routing = select(logits, spec)
    expected = [per_group_by_hand(row, n_group, k) for row in logits.float().tolist()]
    assert routing.topk_ids.tolist() == expected
    # The weights are a softmax over all experts of all groups.
    finite = logits.double().nan_to_num(posinf=MAX, neginf=-MAX)
    weights = torch.softmax(finite, dim=-1).gather(1, torch.tensor(expected))
    torch.testing.assert_close(routing.topk_weights.double(), weights, rtol=1e-5, atol=1e-30)  # 8 ulp, exponents of 10


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("experts", "n_group", "k"), PER_GROUP)
def test_the_order_is_over_all_groups(experts: int, n_group: int, k: int, rows: int) -> None:
    """Keys with a bias, sigmoids of exactly 0, 1/2 and 1: the ids descend by key, not group by group."""
    spec = RouterSpec(8, experts, k, "sigmoid", "score", n_group, n_group, select_per_group=True, renormalize=True)
    scores = torch.randint(0, 3, (rows, experts), generator=generator(experts)) / 2
    logits = torch.tensor([-200.0, 0.0, 40.0])[(scores * 2).long()]
    bias = torch.randint(-3, 4, (experts,), generator=generator(k)) / 4
    got = select(logits, spec, e_score_correction_bias=bias).topk_ids
    assert got.tolist() == [per_group_by_hand(row, n_group, k) for row in (scores + bias).tolist()]


@pytest.mark.parametrize("rows", [1, 40])
def test_ties_within_a_group_go_to_the_lowest_id(rows: int) -> None:
    spec = RouterSpec(8, 12, 4, n_group=2, topk_group=2, select_per_group=True)
    logits = torch.tensor([0, 1.0, 1, 1, 1, 0, -3.0, -2, -0.0, 0.0, -2, -2]).expand(rows, -1)
    assert select(logits, spec).topk_ids.tolist() == [[1, 2, 8, 9]] * rows
    assert select(torch.zeros(rows, 12), spec).topk_ids.tolist() == [[0, 1, 6, 7]] * rows


@pytest.mark.parametrize("rows", [1, 40])
def test_experts_switched_off_are_the_last_of_their_group(rows: int) -> None:
    """Every group gives k / n_group ids even with biases of -Inf or NaN, which count as -MAX, and in NaN rows."""
    spec = RouterSpec(8, 8, 4, "sigmoid", "score", 2, 2, select_per_group=True)
    bias = torch.tensor([-INF, -INF, NAN, 0.25, -INF, INF, 0.5, -0.5])
    logits = torch.zeros(rows, 8)
    routing = select(logits, spec, e_score_correction_bias=bias)
    assert routing.topk_ids.tolist() == [[5, 6, 3, 0]] * rows
    assert routing.topk_weights.eq(0.5).all()  # scores, never biased keys
    on_logits = RouterSpec(8, 8, 4, n_group=2, topk_group=2, select_per_group=True)
    logits[-1] = torch.tensor([NAN, 1, -INF, NAN, 2, 2, INF, 2])
    routing = select(logits, on_logits)
    assert routing.topk_ids[-1].tolist() == [6, 4, 1, 0]
    assert routing.topk_weights[-1].isnan().all()
    assert not routing.topk_weights[:-1].isnan().any()


def cancelling(rows: int, experts: int, seed: int) -> Tensor:
    """Float32 keys of both signs, from 2^-8 to 2^26 in size: the rounding depends on the order of additions."""
    g = generator(seed)
    exponents = torch.randint(-8, 27, (rows, experts), generator=g)
    return torch.randn(rows, experts, generator=g) * torch.exp2(exponents)


def losing(rows: int, experts: int, n_group: int, seed: int) -> Tensor:
    """Float32 keys with 2^24 once a group: added best first, keys below 1 are lost and keys above 1 count as 2."""
    keys = 0.5 + torch.rand(rows, n_group, experts // n_group, generator=generator(seed))
    keys[:, :, -1] = 2.0**24
    return keys.flatten(1)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("experts", "n_group", "topk_group", "j", "k"), BY_SUM)
def test_sums_of_j_keys(experts: int, n_group: int, topk_group: int, j: int, k: int, rows: int) -> None:
    spec = RouterSpec(
        8, experts, k, n_group=n_group, topk_group=topk_group, group_score="topj_sum", group_score_top_j=j
    )
    spec, bias = key_on_bias(spec), torch.randn(experts, generator=generator(1))
    coarse = (cancelling(1, experts, seed=rows) / 2**20).round()
    logits = torch.cat([cancelling(rows, experts, seed=rows)[1:], coarse])
    for given, added in ((logits, bias), (losing(rows, experts, n_group, seed=rows), torch.zeros(experts))):
        routing = select(given, spec, e_score_correction_bias=added)
        expected = [by_sum_by_hand(row, n_group, topk_group, j, k) for row in given + added]
        assert routing.topk_ids.tolist() == expected
        tensors = RouterTensors(e_score_correction_bias=added)
        assert verify_routing(routing, given, spec, tensors).problems == []


SUMS = key_on_bias(
    RouterSpec(8, 9, 3, n_group=3, topk_group=1, group_score="topj_sum", group_score_top_j=3, renormalize=True)
)


def best_group(keys: list[list[float]], spec: RouterSpec = SUMS) -> int:
    """The best group of one row of keys; asserts that the group is the same alone and among many rows."""
    logits = torch.tensor(keys).flatten()
    nothing = torch.zeros(len(logits))
    found = [select(logits.expand(rows, -1), spec, e_score_correction_bias=nothing).topk_ids for rows in (1, 40)]
    groups = torch.cat(found) // len(keys[0])
    assert (groups == groups[0, 0]).all()
    return int(groups[0, 0])


def test_sums_are_added_best_first() -> None:
    """In float32, 2^24 + 1 + 1 is 2^24 and 1 + 1 + 2^24 is more: the best group shows the order of additions."""
    large = 2.0**24
    assert best_group([[large, 0, 0], [1, large, 1], [1, 1, large]]) == 0
    assert best_group([[large, 0, 0], [1, large, 2], [2, 1, large]]) == 1
    assert best_group([[large, 0, 0], [1, large, 3], [1, 3, large]]) == 1  # 2^24 + 4, and + 1 is a tie to even
    assert best_group([[large, 0, 0], [3, large, 3], [3, large, 4]]) == 1  # 4 + 4 by ties to even, as 4 + 3 is 8
    assert best_group([[3, 3, 3], [4, 4, 0.5], [5, 3, 1]]) == 0
    assert best_group([[3, 3, 3], [4, 4, 0.5], [5, 3, 1]], replace(SUMS, group_score_top_j=2)) == 1
    assert best_group([[3, 3, 3], [4, 4, 0.5], [5, 3, 1]], replace(SUMS, group_score_top_j=1)) == 2


def test_a_sum_stays_infinite() -> None:
    """A sum that passes MAX stays infinite whatever is added; a sum beyond -MAX comes last; infinite sums tie."""
    assert best_group([[MAX, 0, 0], [MAX, -MAX, MAX], [MAX, MAX, MAX]]) == 1
    assert best_group([[-MAX, -MAX, 0], [-MAX, -MAX, -1], [-MAX, 0, -1]]) == 2
    assert best_group([[-MAX, -MAX, -MAX], [-MAX, -MAX, -1], [-INF, -MAX, NAN]]) == 0
    assert best_group([[MAX, -MAX, -1], [0, 0, -1], [0, 1, -2]]) == 0  # -1, of which three keys have equal sums
    assert best_group([[-INF, 0, 0], [INF, -INF, INF], [MAX, MAX, 0]]) == 1
    # The reference too: a sum that passes MAX, and would then fall below -MAX.
    falling = [[0.0, 1, 2, 3, 4], [MAX, MAX, -MAX, -MAX, -MAX], [MAX, 0, 0, 0, 0]]
    spec = replace(SUMS, num_experts=15, group_score_top_j=5)
    assert best_group(falling, spec) == 1
    assert problems_of([5, 6, 7], [key for group in falling for key in group], replace(spec, renormalize=False)) == []


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("experts", [64, 60])
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid", "sqrtsoftplus", "identity"])
def test_two_keys_are_top2_sum_to_the_bit(scoring_func: str, experts: int, rows: int) -> None:
    spec = RouterSpec(8, experts, 5, scoring_func, "score", 4, 2)  # type: ignore[arg-type]
    by_j = replace(spec, group_score="topj_sum", group_score_top_j=2)
    bias = torch.randn(experts, generator=generator(experts))
    logits = cancelling(rows, experts, seed=3) / 2**16
    logits[-1] = torch.randn(experts, generator=generator(rows)).round()
    first, second = (select(logits, each, e_score_correction_bias=bias) for each in (spec, by_j))
    assert first.topk_ids.equal(second.topk_ids)
    assert first.topk_weights.equal(second.topk_weights)


@pytest.mark.cpu
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_separated_inputs_are_so_within_each_group(scoring_func: str) -> None:
    """Rounding their logits to bfloat16 changes no choice; for random inputs it changes some."""
    spec = RouterSpec(128, 64, 8, scoring_func, n_group=8, topk_group=8, select_per_group=True)  # type: ignore[arg-type]
    weight = torch.randn(64, 128, generator=generator(4)) / 128**0.5
    separated = separated_hidden(spec, weight, RouterTensors(), 200, seed=1)
    changed = []
    for hidden in (separated, random_hidden(spec, 200, torch.bfloat16, seed=1)):
        logits = hidden.double() @ weight.double().T
        ids = [reference_select(each, spec, RouterTensors()).topk_ids for each in (logits, logits.bfloat16())]
        changed.append(int((ids[0] != ids[1]).any(dim=-1).sum()))
    assert changed[0] == 0
    assert changed[1] > 0


def problems_of(ids: list[int], keys: list[float], spec: RouterSpec) -> list[str]:
    """The verdict's problems with a choice by keys l + 0."""
    logits = torch.tensor([keys])
    weights = torch.sigmoid(logits[0, ids])[None]
    routing = Routing(torch.tensor([ids], dtype=torch.int32), weights)
    return verify_routing(routing, logits, spec, RouterTensors(e_score_correction_bias=torch.zeros(len(keys)))).problems


@pytest.mark.cpu
def test_the_margin_of_a_sum_is_that_of_its_additions() -> None:
    """MAX and -MAX are exact keys, but where they cancel, float32 has lost what was added in between."""
    spec = replace(SUMS, renormalize=False)
    some, nothing = [2.0**101, 0.0, 0.0], [-MAX, -MAX, -MAX]
    lost = [MAX, 2.0**102, -MAX]  # exactly 2^102; 0 in float32
    assert best_group([some, lost, nothing], spec) == 0
    assert problems_of([0, 1, 2], [*some, *lost, *nothing], spec) == []
    assert problems_of([3, 4, 5], [*some, *lost, *nothing], spec) == []
    # 2u of MAX is 2^105: larger differences are no rounding.
    apart = [MAX, -(2.0**107), -MAX]
    assert any("cannot be among the best" in what for what in problems_of([3, 4, 5], [*some, *apart, *nothing], spec))
    # A sum of two keys is rounded once, by 2u of itself.
    by_two, zero = replace(spec, group_score_top_j=2), [MAX, -MAX, -MAX]
    assert problems_of([0, 1, 2], [*some, *zero, *nothing], by_two) == []
    assert any("cannot be among the best" in what for what in problems_of([3, 4, 5], [*some, *zero, *nothing], by_two))


@pytest.mark.cpu
def test_a_choice_per_group_is_held_against_its_own_group() -> None:
    """A larger key is a breach in the same group only; unequal numbers of experts a group are a breach too."""
    spec = key_on_bias(RouterSpec(8, 8, 2, n_group=2, topk_group=2, select_per_group=True))
    keys = [4.0, 3.0, 2.0, 1.0, 0.5, 0.25, 0.5 - 2**-24, 0.0]
    assert problems_of([0, 4], keys, spec) == []
    assert problems_of([0, 6], keys, spec) == []  # within the margin
    assert any("before one with a larger key" in what for what in problems_of([0, 5], keys, spec))
    assert any("before one with a larger key" in what for what in problems_of([1, 4], keys, spec))
    assert any("too many or too few experts of a group" in what for what in problems_of([0, 1], keys, spec))
    assert any("out of order" in what for what in problems_of([4, 0], keys, spec))
    whole = replace(spec, num_experts=4, top_k=2)
    assert any("too many or too few" in what for what in problems_of([0, 1], keys[:4], whole))
