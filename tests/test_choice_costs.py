"""Cost tables, the times that are expected by them, and tables that cannot be used."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cost_tables import CUBLAS, DECODE, GPU, HERE, OPS, a_table, problem
from machines import CPU, described, forget

from moegate import get_spec
from moegate.choice import candidates, costs, tables
from moegate.choice.explain import explain
from moegate.choice.plan import Plan
from moegate.choice.tables import Table, read, shape_of, write
from moegate.machine import Machine
from moegate.problem import default_weight_dtype, problem_of

pytestmark = pytest.mark.usefixtures("shipped")


def test_every_table_of_the_package_can_be_read() -> None:
    found = [read(file) for file in tables._shipped()]
    assert found
    for table in found:
        assert table.rows
        assert table.gpu.bandwidth  # other GPUs find the nearest table by the bandwidth


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = a_table(deepseek_v3={1: {DECODE: 3.25}, 4: {DECODE: 4.0, OPS: 70.0}}, not_frozen={DECODE: 4.5})
    write(tmp_path / "table.json", table)
    again = read(tmp_path / "table.json")
    assert (again.gpu, again.made, again.rows) == (table.gpu, table.made, table.rows)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["table.json"]


def test_measured_and_between_and_beyond(shipped: Callable[..., None]) -> None:
    shipped(a_table(deepseek_v3={4: {DECODE: 2.0}, 16: {DECODE: 8.0}}))
    assert costs.expected(problem(), candidates.ROUTER_GEMM, 4) == (2.0, "measured on GPU X")
    assert costs.expected(problem(), candidates.ROUTER_GEMM, 8) == (4.0, "interpolated between M = 4 and 16 on GPU X")
    assert costs.expected(problem(), candidates.ROUTER_GEMM, 64) == (
        32.0,
        "extrapolated from M = 4 and 16 on GPU X",
    )  # half a us a token
    assert costs.expected(problem(), candidates.ROUTER_GEMM, 1) == (
        2.0,
        "taken from M = 4 on GPU X",
    )  # at few tokens a time is latency
    assert costs.expected(problem(), candidates.TORCH, 4) is None
    assert costs.expected(problem(), candidates.TORCH, 0) == (0.0, "nothing is launched")


def test_other_shapes_come_from_the_two_nearest(shipped: Callable[..., None]) -> None:
    near, far = {128: {OPS: 2.0}}, {128: {OPS: 50.0}}
    shipped(a_table(kimi_k2=near, glm_5={128: {OPS: 4.0}}, mixtral_8x7b=far))
    cost = costs.expected(
        problem("mimo-v2.5-pro"), candidates.TORCH, 128
    )  # 6144 x 384: between kimi's 7168 and glm's 256
    assert cost is not None
    assert 2.0 < cost.us < 4.0
    assert cost.evidence == "interpolated from kimi_k2 and glm_5 on GPU X"
    beyond = costs.expected(problem("mimo-v2.5-pro"), candidates.TORCH, 4096)
    assert beyond is not None
    assert beyond.evidence == "extrapolated from kimi_k2 and glm_5 on GPU X"
    assert costs.expected(problem_of(GPU, get_spec("minimax-m2"), torch.float32), candidates.TORCH, 128) is None


def test_one_neighbour_is_not_the_shape_itself(shipped: Callable[..., None]) -> None:
    shipped(a_table(kimi_k2={1: {CUBLAS: 2.0}}))
    cost = costs.expected(problem("deepseek-v3"), candidates.CUBLAS, 1)
    assert cost is not None
    assert "measured" not in cost.evidence


def test_of_hidden_states_with_32_bits_no_table_tells(shipped: Callable[..., None]) -> None:
    shipped(a_table(deepseek_v3={1: {DECODE: 2.0}}))
    assert costs.expected(problem().given(torch.float16, None), candidates.ROUTER_GEMM, 1) is not None
    assert costs.expected(problem().given(torch.float32, None), candidates.ROUTER_GEMM, 1) is None


@pytest.mark.parametrize("model", ["gemma-4-26b-a4b", "deepseek-v3"])
def test_where_pytorch_makes_the_logits_no_time_of_cublas_is_told_and_a_note_is(
    model: str, shipped: Callable[..., None]
) -> None:
    times = {4096: {CUBLAS: 9.0, OPS: 90.0}}
    shipped(a_table(gemma_4_26b_a4b=times, deepseek_v3=times))
    usual = problem(model)
    explained = [explain(Plan(each), 4096) for each in (usual, usual.given(torch.float16, None))]
    assert [each.kernel for each in explained] == ["cublas+select", "cublas+select"]
    assert [each.expected_us for each in explained] == [9.0, None]
    assert explained[0].notes == ()
    assert "cuBLAS takes hidden states in bfloat16, and these are in float16" in explained[1].notes[0]


MEASURED = Path(__file__).parent.parent / "benchmarks" / "results" / "h100.csv"


def test_the_table_of_the_h100_tells_the_times_of_other_routers() -> None:
    """The error of inferred times is below the 13 % of times at the same M (geometric means); prints the errors."""
    (gpu,) = (table.gpu for table in map(read, tables._shipped()) if table.gpu.name == "NVIDIA H100 80GB HBM3")
    off: dict[tuple[str, int], float] = {}
    with MEASURED.open(newline="", encoding="utf-8") as text:
        rows = [row for row in csv.DictReader(text) if (row["part"], row["contestant"]) == ("catalog", "moegate")]
    for row in rows:
        spec, tokens = get_spec(row["model"]), int(row["tokens"])
        cost = costs.expected(problem_of(gpu, spec, default_weight_dtype(spec)), candidates.ROUTER_GEMM, tokens)
        assert cost is not None
        if not cost.evidence.startswith(("measured", "interpolated between M")):
            off[row["model"], tokens] = cost.us / float(row["us"])
    mean = math.exp(sum(abs(math.log(ratio)) for ratio in off.values()) / len(off))
    least, most = min(off, key=lambda key: off[key]), max(off, key=lambda key: off[key])
    print(f"{len(off)} times off by {mean - 1:.1%}; {least}: {off[least]:.2f}, {most}: {off[most]:.2f}")
    assert len(off) > 300
    assert mean < 1.115


def test_of_two_shapes_as_near_the_one_with_the_same_kind_of_router_counts_more(shipped: Callable[..., None]) -> None:
    # trinity-mini is 2048 x 128, too; its sigmoid, bias and bfloat16 logits are those of laguna-xs-2.1 (2048 x 256).
    shipped(a_table(laguna_xs_2_1={1: {OPS: 2.0}}, qwen3_5_35b_a3b={1: {OPS: 8.0}}))
    cost = costs.expected(problem("trinity-mini"), candidates.TORCH, 1)
    assert cost is not None
    assert 2.0 < cost.us < 3.9  # the mean of both would be 4
    assert cost.evidence.startswith("interpolated from laguna_xs_2_1 and")
    far = costs.expected(problem("qwen3-30b-a3b"), candidates.TORCH, 1)
    assert far is not None
    assert far.us > 4.1


def test_a_spec_that_differs_in_a_factor_alone_has_the_same_shape() -> None:
    spec = get_spec("deepseek-v3")
    other = dataclasses.replace(spec, routed_scaling_factor=1.5, renormalize_eps=0.0)
    assert shape_of(problem_of(GPU, other, torch.bfloat16)) == shape_of(problem())
    other = dataclasses.replace(spec, n_group=1, topk_group=1)
    assert shape_of(problem_of(GPU, other, torch.bfloat16)) != shape_of(problem())


def test_an_unknown_gpu_is_inferred_from_its_nearest_relative(shipped: Callable[..., None]) -> None:
    old, new = Machine("Old", (8, 0), 108, 2000.0), Machine("New", (10, 0), 148, 8000.0)
    small, large = Machine("Small", (9, 0), 114, 2000.0), Machine("Large", (9, 0), 132, 4800.0)
    shipped(*(a_table(gpu, deepseek_v3={1: {DECODE: 3.0}}) for gpu in (old, small, large, new)))

    def evidence(machine: Machine) -> str:
        cost = costs.expected(problem(machine=machine), candidates.ROUTER_GEMM, 1)
        assert cost is not None
        return cost.evidence

    assert evidence(described("sm_103")) == "inferred from New (sm_100): measured there"
    assert evidence(described("sm_86")).startswith("inferred from Old")
    assert evidence(Machine("H100", (9, 0), 132, 3350.0)).startswith("inferred from Small")
    assert evidence(Machine("H20", (9, 0), 78, 4000.0)).startswith("inferred from Large")
    assert evidence(large) == "measured on Large"
    explanation = explain(Plan(problem(machine=described("sm_103"))), 1)
    assert explanation.evidence.startswith("inferred from New")


def test_nothing_is_inferred_between_chips_with_and_without_early_starts(shipped: Callable[..., None]) -> None:
    gpu = Machine("Small", (9, 0), 114, 2000.0)
    shipped(a_table(gpu, deepseek_v3={1: {DECODE: 3.0}}))
    assert costs.expected(problem(machine=described("sm_89")), candidates.ROUTER_GEMM, 1) is None
    assert costs.expected(problem(machine=described("sm_100")), candidates.ROUTER_GEMM, 1) is not None


# A table in the user's folder.


def own_file(table: Table) -> Path:
    path = tables.user_file("GPU X")
    write(path, table)
    forget()
    return path


def test_the_users_own_table_comes_first(shipped: Callable[..., None]) -> None:
    shipped(a_table(deepseek_v3={1: {DECODE: 3.0}}))
    own_file(a_table(deepseek_v3={1: {DECODE: 2.5}}))
    assert costs.expected(problem(machine=HERE), candidates.ROUTER_GEMM, 1) == (2.5, "measured on this GPU X")
    elsewhere = dataclasses.replace(HERE, device=None)
    assert costs.expected(problem(machine=elsewhere), candidates.ROUTER_GEMM, 1) == (3.0, "measured on GPU X")


def _text(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return changed


BROKEN: dict[str, tuple[Callable[[str], str], str]] = {
    "cut": (lambda text: text[: len(text) // 2], "cannot be used: "),
    "empty": (lambda text: "", "cannot be used: "),
    "a list": (lambda text: "[]", "schema 'list', where this version reads 1"),
    "another schema": (_text(lambda table: table.update(schema=99)), "schema 99, where this version reads 1"),
    "no rows": (_text(lambda table: table.pop("rows")), "no 'rows'"),
    "not one row": (_text(lambda table: table.update(rows=[])), "it has no rows"),
    "endless": (lambda text: "[" * 100_000, "cannot be used: "),
    "no size": (_text(lambda table: table["rows"][0].update(hidden_size=0)), "the sizes [0, 256, 8]"),
    "true for a size": (_text(lambda table: table["rows"][0].update(top_k=True)), "top_k = True"),
    "a dtype": (_text(lambda table: table["rows"][0].update(weight_dtype="int8")), "weight_dtype = 'int8'"),
    "an endless time": (
        _text(lambda table: table["rows"][0].update(us={DECODE: math.inf})),
        "inf for cuda:router_gemm",
    ),
    "text for a time": (_text(lambda table: table["rows"][0].update(us={DECODE: "3.1"})), "'3.1' for cuda"),
    "no commit": (_text(lambda table: table["made"].pop("moegate_commit")), "made has no moegate_commit"),
    "text for a size": (_text(lambda table: table["rows"][0].update(gate_rows="256")), "gate_rows = '256'"),
    "no time": (_text(lambda table: table["rows"][0].update(us={DECODE: 0.0})), "a time that is none"),
    "no time of others": (
        _text(lambda table: table["rows"][0].update(us_not_frozen={DECODE: -1.0})),
        "time that is none",
    ),
    "no tokens": (_text(lambda table: table["rows"][0].update(tokens=0)), "0 tokens"),
    "other GPU": (_text(lambda table: table["gpu"].update(num_sms=78)), "is stale: it is of GPU X with 78"),
    "old": (_text(lambda table: table["made"].update(moegate="0.0.1")), "is stale: moegate 0.0.1 made it"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_stale_table_is_named_and_ignored(shipped: Callable[..., None], name: str) -> None:
    shipped(a_table(deepseek_v3={1: {DECODE: 3.0}}))
    path = own_file(a_table(deepseek_v3={1: {DECODE: 2.5}}))
    change, expected = BROKEN[name]
    path.write_text(change(path.read_text()))
    with pytest.warns(RuntimeWarning, match="it is ignored"):
        explanation = explain(Plan(problem(machine=HERE)), 1)
    assert (explanation.expected_us, explanation.evidence) == (3.0, "measured on GPU X")
    (note,) = explanation.notes
    assert str(path) in note
    assert expected in note


def test_no_gpu_has_no_times() -> None:
    explanation = explain(Plan(problem(machine=Machine("cpu", device=CPU))), 1)
    assert (explanation.expected_us, explanation.evidence) == (None, "nothing measured says anything about it")
