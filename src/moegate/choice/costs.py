"""The expected time of a candidate, from the cost tables, and the evidence for the time."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

from moegate.choice.candidates import Candidate
from moegate.choice.chips import most_bandwidth
from moegate.choice.tables import Shape, Table, shape_of, table_for
from moegate.gemm.router_gemm_tiling import ROWS_OF_TILE
from moegate.machine import Machine
from moegate.problem import Problem

_SAME_KIND = 0.2  # how much nearer, in steps of e of a size, a shape is that has the same kind of router


class Cost(NamedTuple):
    """An expected time."""

    us: float
    """Microseconds in a CUDA graph behind a predecessor, less the predecessor's."""
    evidence: str
    """"measured on ...", or how the time follows from measured times."""


@cache
def expected(problem: Problem, candidate: Candidate, num_tokens: int) -> Cost | None:
    """The time of a candidate; None: no table says anything about it."""
    if num_tokens == 0:
        return Cost(0.0, "nothing is launched")
    found, near = table_for(problem.machine), neighbours(problem, candidate, num_tokens)
    if found.table is None or not near:
        return None
    us, gpu = math.exp(sum(each.weight * math.log(each.us) for each in near)), found.table.gpu
    what = near[0].how or "measured"
    if shape_of(problem) not in curves_of(found.table, candidate.key(problem), problem.frozen):
        is_between = all(each.how is None or each.how.startswith("interpolated") for each in near)
        what = f"{'inter' if is_between else 'extra'}polated from {' and '.join(each.model for each in near)}"
    if found.is_inferred:
        return Cost(round(us, 3), f"inferred from {gpu.name} (sm_{gpu.sm}): {what} there")
    return Cost(round(us, 3), f"{what} on {'this ' * found.table.is_own}{gpu.name}")


def at_least_floor(problem: Problem, cost: Cost, num_tokens: int) -> Cost:
    """A cost for people: a time inferred from another GPU, but no less than this GPU takes to read the inputs.

    The floor reads the weight and the hidden states once, from memory; a chip in whose cache they lie may be faster. A
    chip that is known by its architecture alone is taken for the one with the most bandwidth. Plans compare times
    without it.
    """
    machine, found = problem.machine, table_for(problem.machine)
    if num_tokens == 0 or not found.is_inferred or machine.capability is None:
        return cost
    bandwidth = machine.bandwidth or most_bandwidth(machine.capability)
    if bandwidth is None:
        return cost
    spec, dtypes = problem.spec, problem.dtypes
    read = spec.hidden_size * (spec.num_gate_rows * dtypes.weight.itemsize + num_tokens * dtypes.hidden.itemsize)
    us = read / (bandwidth * 1e3)
    if cost.us >= us:
        return cost
    floor = f"no less than reading {read / 1e6:.1f} MB, weight and hidden states, from memory at {bandwidth:g} GB/s"
    return Cost(round(us, 3), f"{floor}; {cost.evidence}, {cost.us:.2f} us")


class Neighbour(NamedTuple):
    """A measured shape, the nearest or the shape itself, and the time that it predicts for the shape asked for."""

    model: str
    weight: float
    """Its share in the mean."""
    us: float
    how: str | None
    """How `us` was found; None: it was measured."""


def neighbours(problem: Problem, candidate: Candidate, num_tokens: int) -> tuple[Neighbour, ...]:
    """The table's times of a candidate at the shape itself or the two nearest shapes; none, if no table has any."""
    table = table_for(problem.machine).table
    # Tables hold times with hidden states of 16 bits, which say nothing about 32 bits.
    if table is None or problem.dtypes.hidden == torch.float32 or candidate.gemm.falls_back(problem) is not None:
        return ()
    curves, shape = curves_of(table, candidate.key(problem), problem.frozen), shape_of(problem)
    near = [(shape, 1.0)] if shape in curves else _nearest(curves, shape)
    found = []
    for other, weight in near:
        model, curve = curves[other]
        like = num_tokens * _work(shape) / _work(other) if candidate.backend == "cuda" else num_tokens
        found.append(Neighbour(model, weight, *_at(curve, like)))
    return tuple(found)


@cache
def tells_of_not_frozen(machine: Machine, key: str) -> bool:
    """True if the machine's table has a candidate's times for gates that are not frozen, wherever it has any."""
    table = table_for(machine).table
    return table is not None and all(key in row.us_not_frozen for row in table.rows if key in row.us)


@cache
def most_tokens(machine: Machine, key: str) -> int:
    """The most tokens at which the table for a machine has a time of a candidate; 0: at none."""
    table = table_for(machine).table
    return max((row.tokens for row in table.rows if key in row.us), default=0) if table is not None else 0


def _work(shape: Shape) -> int:
    """The work of a token that times of the cuda backend scale with: K * ceil(R / 16).

    The time at equal work predicts a shape's time better than the time at equal tokens (test_choice_costs.py and
    test_choice_measured.py hold both against an H100's).
    """
    return shape.hidden_size * -(-shape.gate_rows // ROWS_OF_TILE)


_Curve = dict[int, float]


@cache
def curves_of(table: Table, key: str, frozen: bool) -> dict[Shape, tuple[str, _Curve]]:
    """One candidate's times: by shape, the model's name and the times by number of tokens."""
    curves: dict[Shape, tuple[str, _Curve]] = {}
    for row in table.rows:
        times = row.times(frozen=frozen)
        if key in times:
            curves.setdefault(row.shape, (row.model, {}))[1][row.tokens] = times[key]
    return curves


def _at(curve: _Curve, num_tokens: float) -> tuple[float, str | None]:
    """The time at a number of tokens, and how it was found if it was not measured.

    Between two that were, in the logarithms of both; beyond, by what each further token took.
    """
    if num_tokens in curve:
        return curve[int(num_tokens)], None
    known = sorted(curve)
    if num_tokens < known[0] or len(known) == 1:  # below, a time is latency
        return curve[known[0]], f"taken from M = {known[0]}"
    above = next((index for index, tokens in enumerate(known) if tokens > num_tokens), len(known) - 1)
    low, high = known[max(above, 1) - 1], known[max(above, 1)]
    if num_tokens > high:
        of_token = max(0.0, curve[high] - curve[low]) / (high - low)
        return curve[high] + of_token * (num_tokens - high), f"extrapolated from M = {low} and {high}"
    share = math.log(num_tokens / low) / math.log(high / low)
    us = math.exp((1 - share) * math.log(curve[low]) + share * math.log(curve[high]))
    return us, f"interpolated between M = {low} and {high}"


def _nearest(curves: dict[Shape, tuple[str, _Curve]], shape: Shape) -> list[tuple[Shape, float]]:
    """The two nearest shapes whose GEMM is of the same kind, with the share of each in the time."""
    apart = sorted(
        (_distance(other, shape), index, other)
        for index, other in enumerate(curves)
        if other.weight_dtype == shape.weight_dtype and other.has_input_norm == shape.has_input_norm
    )[:2]
    inverse = [1 / (distance + 1e-3) for distance, _, _ in apart]
    return [(other, part / sum(inverse)) for part, (_, _, other) in zip(inverse, apart, strict=True)]


def _distance(one: Shape, other: Shape) -> float:
    sizes = abs(math.log(one.hidden_size / other.hidden_size)) + abs(math.log(one.gate_rows / other.gate_rows))
    return sizes + abs(math.log(one.top_k / other.top_k)) / 4 + _SAME_KIND * (one.router != other.router)
