"""docs/contract.md: NaN, infinities, special biases and bad token ids."""

from __future__ import annotations

import pytest
import torch
from on_device import back, select, there
from routers import SPECS, VOCABULARY, random_logits, select_arguments, tensors_of
from torch import Tensor

from moegate import RouterSpec
from moegate.choice.dispatch import Options, for_selection
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors

INF, NAN, MAX = torch.inf, torch.nan, torch.finfo(torch.float32).max


def nan_rows(part: Tensor | None) -> list[bool]:
    assert part is not None
    return part.reshape(len(part), -1).isnan().all(dim=-1).tolist()


@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("name", SPECS)
def test_nan_rows(name: str, rows: int) -> None:
    """A NaN anywhere makes the weights of its row NaN, and of no other row; the ids are those of a logit of -MAX."""
    spec = SPECS[name]
    tensors = tensors_of(spec)
    arguments = select_arguments(spec, tensors, rows)
    logits = random_logits(spec, rows)
    logits[1, -1] = NAN  # the last row of the gate: an expert, a zero expert or a shared gate
    logits[2] = NAN
    logits[3, 0] = INF
    routing = select(logits, spec, **arguments)
    expected = [False, True, True, False] + [False] * (rows - 4)
    assert nan_rows(routing.topk_weights) == expected
    assert not routing.topk_weights[[0, 3]].isnan().any()
    if spec.num_shared_gates:
        assert nan_rows(routing.shared_weights) == expected
    if spec.num_zero_experts:
        assert nan_rows(routing.identity_weight) == expected
    assert verify_routing(routing, logits, spec, tensors, input_ids=arguments.get("input_ids")).problems == []
    if not spec.hash_routing and spec.num_selectable > 1:
        lowest = logits.nan_to_num(nan=torch.finfo(torch.float32).min)
        assert routing.topk_ids.equal(select(lowest, spec, **arguments).topk_ids)


@pytest.mark.parametrize("name", SPECS)
def test_infinities_count_as_the_largest_float32(name: str) -> None:
    spec = SPECS[name]
    tensors = tensors_of(spec)
    logits = random_logits(spec, 6).float()
    logits[0] = -INF
    logits[1] = INF
    logits[2, ::2] = INF
    logits[3, ::2] = -INF
    logits[4, 0], logits[4, -1] = INF, -INF
    arguments = select_arguments(spec, tensors, 6)
    routing = select(logits, spec, **arguments)
    finite = logits.nan_to_num()
    same = select(finite, spec, **arguments)
    assert routing.topk_ids.equal(same.topk_ids)
    assert routing.topk_weights.equal(same.topk_weights)
    assert not routing.topk_weights.isnan().any()
    assert verify_routing(routing, logits, spec, tensors, input_ids=arguments.get("input_ids")).problems == []


def test_an_infinite_logit_takes_all_of_a_softmax() -> None:
    spec = RouterSpec(8, 4, 3)
    logits = torch.tensor([[INF, 0.0, INF, -INF], [-INF, -INF, -INF, -INF]])
    routing = select(logits, spec)
    assert routing.topk_ids.tolist() == [[0, 2, 1], [0, 1, 2]]
    assert routing.topk_weights.tolist() == [[0.5, 0.5, 0.0], [0.25, 0.25, 0.25]]


def test_special_biases() -> None:
    """A bias of -Inf or NaN puts an expert last; +Inf puts an expert first."""
    logits = torch.zeros(1, 5)
    for score in ("score", "logit"):
        spec = RouterSpec(8, 5, 3, "sigmoid", score)
        for bias, expected in (
            ([-INF, 0, NAN, 0, 0], [1, 3, 4]),
            ([-INF, 0, NAN, -INF, INF], [4, 1, 0]),
            ([NAN] * 5, [0, 1, 2]),
        ):
            for rows in (1, 40):
                many = logits.expand(rows, -1)
                routing = select(many, spec, e_score_correction_bias=torch.tensor(bias, dtype=torch.float32))
                assert routing.topk_ids[-1].tolist() == expected
                assert routing.topk_weights.eq(0.5).all()  # never NaN: the row had none


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_experts_switched_off_leave_their_group(rows: int) -> None:
    """-Inf counts as -MAX, from logits and from biases, for few and for many rows."""
    spec = RouterSpec(4, 6, 1, "sigmoid", "score", n_group=3, topk_group=2)
    bias = torch.tensor([-INF, -INF, 0, -INF, 0, -INF])
    logits = torch.tensor([0, 0, -2.0, 0, 2.0, 0]).expand(rows, -1)
    routing = select(logits, spec, e_score_correction_bias=bias)
    assert routing.topk_ids.tolist() == [[4]] * rows  # groups 1 and 2: group 0 has no expert left
    routing = select(torch.tensor([[5.0, -INF, -MAX]]).expand(rows, -1), RouterSpec(4, 3, 2))
    assert routing.topk_ids.tolist() == [[0, 1]] * rows


@pytest.mark.parametrize("bias", [-INF, -1e30, 1e30, NAN])
@pytest.mark.parametrize("rows", [1, 40])
def test_excluded_groups_stay_excluded(bias: float, rows: int) -> None:
    """Even where all keys of the remaining groups are the lowest possible, and the excluded keys are not."""
    spec = RouterSpec(8, 8, 3, "sigmoid", "score", n_group=2, topk_group=1)
    kept = torch.tensor([3.4e38, bias, bias, bias])
    other = torch.tensor([1.0, 1.0, 1.0, 1.0])
    routing = select(torch.zeros(rows, 8), spec, e_score_correction_bias=torch.cat([other, kept]))
    first_group = routing.topk_ids[0] < 4
    assert first_group.all() or not first_group.any()
    if bias in (-1e30, 1e30):
        assert routing.topk_ids[-1].tolist() == [4, 5, 6]


def test_hash_routing() -> None:
    """The ids are the table's, in its order; the weights are the scores at those ids."""
    spec = RouterSpec(8, 6, 2, "sigmoid", hash_routing=True)
    table = torch.tensor([[5, 0], [1, 2], [3, 1]])
    logits = torch.zeros(4, 6)
    logits[:, 1] = 40
    for dtype in (torch.int32, torch.int64):
        routing = select(logits, spec, tid2eid=table.to(dtype), input_ids=torch.tensor([2, 0, 2, 1]).to(dtype))
        assert routing.topk_ids.tolist() == [[3, 1], [5, 0], [3, 1], [1, 2]]
        assert routing.topk_weights.tolist() == [[0.5, 1.0], [0.5, 0.5], [0.5, 1.0], [1.0, 0.5]]


@pytest.mark.cpu
@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_token_ids_outside_the_table_are_refused(bad: int) -> None:
    """On a CPU, where the check needs no synchronization."""
    spec = SPECS["hash"]
    arguments = select_arguments(spec, tensors_of(spec), 3)
    arguments["input_ids"] = torch.tensor([0, bad, 1])
    with pytest.raises(ValueError, match=rf"input_ids: got {bad}; allowed: 0 to {VOCABULARY - 1}"):
        select(random_logits(spec, 3), spec, **arguments)


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_token_ids_outside_the_table(bad: int, device: torch.device) -> None:
    """Where a backend cannot check, such an id reads the nearest row of the table, and its weights are NaN."""
    spec = SPECS["hash"]
    tensors = tensors_of(spec)
    assert tensors.tid2eid is not None
    input_ids = torch.tensor([0, bad, 1])
    # Calls the backend itself, since on a CPU the public function refuses such ids.
    moved = RouterTensors(tid2eid=there(tensors.tid2eid))
    logits = there(random_logits(spec, 3))
    dispatch = for_selection(device, spec, logits.dtype, moved, Options())
    routing = back(dispatch.select(logits, moved, there(input_ids)))
    assert routing.topk_ids[1].equal(tensors.tid2eid[0 if bad < 0 else -1])
    assert nan_rows(routing.topk_weights) == [False, True, False]
