"""The choices of the measured policy, by the times of a table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from cost_tables import CUBLAS, DECODE, GPU, HERE, OPS, a_table, problem
from machines import CPU, pretend
from routers import SPECS

from moegate import Gate, catalog, get_spec
from moegate.choice import candidates, costs, policies, tables
from moegate.choice.dispatch import Options, for_route
from moegate.choice.explain import explain
from moegate.choice.plan import Plan
from moegate.choice.tables import read
from moegate.problem import default_weight_dtype, problem_of
from moegate.routing import RouterTensors

pytestmark = pytest.mark.usefixtures("shipped")


def test_the_fastest_that_keeps_the_contract_is_chosen(shipped: Callable[..., None]) -> None:
    pair = "flashinfer:cublas+fused_topk_deepseek"
    machine = dataclasses.replace(GPU, flashinfer="0.7.2")
    times = {DECODE: 9.0, OPS: 5.0, pair: 1.0}
    beyond = {CUBLAS: 9.0, OPS: 12.0}
    shipped(
        a_table(deepseek_v3={64: times, 65: beyond, 256: {CUBLAS: 9.0, OPS: 12.0}, 4096: {CUBLAS: 90.0, OPS: 60.0}})
    )
    plan = Plan(problem(machine=machine))
    assert [plan.choice(tokens).candidate.backend for tokens in (1, 64, 65, 256, 4096)] == [
        "cuda",
        "cuda",  # other candidates are faster up to 64, but break the promise of equal bits
        "cuda",
        "cuda",
        "torch",
    ]
    rejected = {entry.kernel: entry for entry in explain(plan, 64).rejected}
    assert rejected["cublas+fused_topk_deepseek"].expected_us == 1.0
    assert "breaks a promise" in rejected["cublas+fused_topk_deepseek"].reason
    assert [(first, last) for first, last, candidate in plan.spans if candidate.backend == "torch"][-1][1] is None


def test_router_gemm_runs_as_far_as_it_takes_no_more(
    shipped: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, fast = {DECODE: 9.0, CUBLAS: 8.0}, {DECODE: 7.0, CUBLAS: 8.0}
    beyond = {CUBLAS: 9.0, OPS: 50.0}
    for times, most in (
        ({128: slow, 256: fast}, 64),
        ({128: fast, 256: slow}, 192),  # interpolated, it is 1.3 % slower there, which counts as equal
        ({128: {DECODE: 8.2, CUBLAS: 8.0}}, 64),
        ({128: {DECODE: 8.1, CUBLAS: 8.0}}, 128),
        ({128: fast, 512: fast, 1024: slow}, 768),
        ({128: fast, 1024: fast}, 1024),
        ({64: {DECODE: 1.0}}, 64),  # no times beyond 64 were measured
        ({128: fast}, 128),
        ({128: {CUBLAS: 7.0}}, 64),
    ):
        shipped(a_table(deepseek_v3={**times, 4096: beyond}))
        plan = Plan(problem())
        assert policies.gemm_tokens(problem()) == most
        runs = [explain(plan, tokens).kernel for tokens in (1, 64, most, most + 1, 2048)]
        assert runs == ["router_gemm+select"] * 3 + ["cublas+select"] * 2
        spans = [(first, candidate.key(problem())) for first, _, candidate in plan.spans]
        assert spans == [(1, DECODE), (most + 1, CUBLAS)]
        pretend(monkeypatch, HERE)
        weight = torch.zeros(256, 7168, dtype=torch.bfloat16)
        tensors = RouterTensors(e_score_correction_bias=torch.zeros(256))
        dispatch = for_route(CPU, get_spec("deepseek-v3"), weight, tensors, Options(frozen=True))
        halves = [dispatch._at("both", tokens, torch.bfloat16) for tokens in (1, most, most + 1, 1 << 20)]
        assert halves[0] is halves[1]
        assert halves[2] is halves[3]
        assert halves[1] is not halves[2]


def test_where_a_gemm_is_not_latency_a_shape_is_inferred_by_work(shipped: Callable[..., None]) -> None:
    """qwen3-30b-a3b (2048 x 128) at 256 tokens has the same work as glm-4.5-air (4096 x 128) at 128."""
    times = {64: {DECODE: 4.0}, 128: {DECODE: 7.0, CUBLAS: 8.0}, 256: {DECODE: 11.0, CUBLAS: 9.0}}
    shipped(a_table(glm_4_5_air=times))
    small = problem("qwen3-30b-a3b")
    found = [costs.expected(small, candidates.ROUTER_GEMM, tokens) for tokens in (64, 256)]
    assert [cost.us for cost in found if cost is not None] == [4.0, 7.0]
    cublas = costs.expected(small, candidates.CUBLAS, 256)
    assert cublas is not None
    assert cublas.us == 8.0
    assert (policies.gemm_tokens(problem("glm-4.5-air")), policies.gemm_tokens(small)) == (128, 256)


def test_a_shape_that_was_not_measured_needs_both_its_neighbours(shipped: Callable[..., None]) -> None:
    large = {128: {DECODE: 6.0, CUBLAS: 9.0}, 256: {DECODE: 7.0, CUBLAS: 9.0}}
    small = {128: {DECODE: 5.7, CUBLAS: 5.5}, 256: {DECODE: 7.0, CUBLAS: 8.0}}
    between = problem("llama-4-maverick")  # 5120 x 128
    shipped(a_table(glm_4_5_air=large, k_exaone_236b_a23b=large))
    assert policies.gemm_tokens(between) > 64
    shipped(a_table(glm_4_5_air=large, k_exaone_236b_a23b=small))
    assert policies.gemm_tokens(between) == 64


def test_the_gemm_chosen_for_a_shape_that_the_table_lacks(shipped: Callable[..., None]) -> None:
    """Leaves out each shape of the H100's table, infers its choice from the others, and compares; prints misses."""
    (table,) = (table for table in map(read, tables._shipped()) if table.gpu.name == "NVIDIA H100 80GB HBM3")
    lost: dict[tuple[str, int], float] = {}
    for model in {row.model for row in table.rows}:
        shipped(dataclasses.replace(table, rows=tuple(row for row in table.rows if row.model != model)))
        spec = get_spec(model)
        most = policies.gemm_tokens(problem_of(table.gpu, spec, default_weight_dtype(spec)))
        for row in table.rows:
            if row.model == model and {DECODE, CUBLAS} <= row.us.keys():
                chosen = row.us[DECODE if row.tokens <= most else CUBLAS]
                lost[model, row.tokens] = chosen / min(row.us[DECODE], row.us[CUBLAS])
    wrong = {key: ratio for key, ratio in sorted(lost.items(), key=lambda item: -item[1]) if ratio > policies.TIE}
    print(f"{len(wrong)} of {len(lost)} times:", *(f"{key}: {ratio:.2f};" for key, ratio in wrong.items()))
    mean = math.exp(sum(map(math.log, lost.values())) / len(lost))
    assert len(lost) > 60
    assert mean < 1.02  # cuBLAS alone: 1.04 times the better one's time, at worst 1.93 times
    assert max(lost.values()) < 1.3


def test_times_beyond_those_measured_do_not_change_the_choice(shipped: Callable[..., None]) -> None:
    """62 to 180 us and 124 to 200 us: extrapolated, the lines would cross at about 6000 tokens."""
    shipped(a_table(deepseek_v3={1024: {CUBLAS: 62.0, OPS: 124.0}, 4096: {CUBLAS: 180.0, OPS: 200.0}}))
    plan = Plan(problem())
    assert {candidate.backend for candidate in plan.candidates} == {"cuda"}
    explanation = explain(plan, 1 << 20)
    torch_ops = next(entry for entry in explanation.rejected if entry.kernel == "mm+ops")
    assert explanation.expected_us is not None
    assert torch_ops.expected_us is not None
    assert torch_ops.expected_us < explanation.expected_us
    assert torch_ops.reason == "slower at the most tokens that were measured"


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu_with_a_table_every_router_runs_on_the_kernels(weight_dtype: torch.dtype) -> None:
    gpus = [read(file).gpu for file in tables._shipped()]
    specs = {**SPECS, **{model.name: model.spec for model in catalog.models()}}
    for gpu in gpus:
        for name, spec in specs.items():
            if spec.weight_dtype in (None, str(weight_dtype).removeprefix("torch.")):
                plan = Plan(problem_of(gpu, spec, weight_dtype))
                assert {candidate.backend for candidate in plan.candidates} == {"cuda"}, (gpu.name, name)


def test_a_gate_that_is_not_frozen_says_whose_times_it_tells(
    shipped: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(a_table(qwen3_30b_a3b={1: {DECODE: 3.0}}))
    pretend(monkeypatch, HERE)
    spec = get_spec("qwen3-30b-a3b")
    for frozen, notes in ((True, ()), (False, ("the times are a frozen gate's; this one is not frozen",))):
        gate = Gate(spec, torch.zeros(128, 2048, dtype=torch.bfloat16), frozen=frozen)
        assert gate.explain(1).expected_us == 3.0
        assert gate.explain(1).notes == notes
    shipped(a_table(qwen3_30b_a3b={1: {DECODE: 3.0}}, not_frozen={DECODE: 3.5}))
    for frozen, us in ((True, 3.0), (False, 3.5)):
        gate = Gate(spec, torch.zeros(128, 2048, dtype=torch.bfloat16), frozen=frozen)
        assert gate.explain(1).expected_us == us
        assert gate.explain(1).notes == ()
    table = a_table(qwen3_30b_a3b={1: {DECODE: 3.0}, 4: {DECODE: 3.0}}, not_frozen={DECODE: 3.5})
    shipped(dataclasses.replace(table, rows=(table.rows[0], dataclasses.replace(table.rows[1], us_not_frozen={}))))
    gate = Gate(spec, torch.zeros(128, 2048, dtype=torch.bfloat16))
    assert gate.explain(4).notes == ("the times are a frozen gate's; this one is not frozen",)


def test_a_gate_that_is_not_frozen_is_planned_by_its_own_times(
    shipped: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(a_table(deepseek_v3={128: {DECODE: 8.0, CUBLAS: 8.5}, 256: {CUBLAS: 9.0}}, not_frozen={DECODE: 9.0}))
    pretend(monkeypatch, HERE)
    spec = get_spec("deepseek-v3")
    weight, bias = torch.zeros(256, 7168, dtype=torch.bfloat16), torch.zeros(256)
    for frozen, kernel, most in ((True, "router_gemm+select", 128), (False, "cublas+select", 64)):
        gate = Gate(spec, weight, e_score_correction_bias=bias, frozen=frozen)
        assert gate.explain(128).kernel == kernel
        assert gate._notice()[0].dispatch.plan.spans[0].last == most


def test_a_time_is_compared_with_a_time_only(shipped: Callable[..., None]) -> None:
    shipped(a_table(deepseek_v3={256: {OPS: 1.0}}))
    assert Plan(problem()).choice(256).candidate.backend == "cuda"
