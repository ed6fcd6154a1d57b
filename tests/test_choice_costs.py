"""Cost tables, the time that they let expect, and what becomes of a table that cannot be used."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import CPU, StandIn, described, forget, pretend, pretended
from routers import SPECS

from moegate import __version__, catalog, get_spec
from moegate.choice import costs, planned, policies, tables
from moegate.choice.facts import Facts, Machine, facts_of
from moegate.choice.plan import Plan
from moegate.choice.tables import Row, Table, read, shape_of, write

DECODE, CUBLAS, OPS = "cuda:router_gemm+select", "cuda:cublas+select", "torch:mm+ops"
MADE = {name: "x" for name in ("date", "command", "moegate_commit", "torch", "cuda", "flashinfer", "driver")}
MADE["moegate"] = __version__
NAMES = {"glm_4_5_air": "glm-4.5-air", "laguna_xs_2_1": "laguna-xs-2.1", "qwen3_5_35b_a3b": "qwen3.5-35b-a3b"}
GPU = Machine("GPU X", (9, 0), 100, 3000.0)


def facts(model: str = "deepseek-v3", machine: Machine = GPU) -> Facts:
    return facts_of(machine, get_spec(model), torch.bfloat16)


def a_table(gpu: Machine = GPU, **us: dict[int, dict[str, float]]) -> Table:
    """By model, with _ for -, and number of tokens the times."""
    rows = [
        Row(model, shape_of(facts(NAMES.get(model, model.replace("_", "-")))), tokens, times, {})
        for model, by_tokens in us.items()
        for tokens, times in by_tokens.items()
    ]
    return Table(gpu, dict(MADE), tuple(rows))


@pytest.fixture(autouse=True)
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """The tables of the package, and no others; the user's folder is an empty one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def ship(*given: Table) -> None:
        forget()
        files = [tmp_path / f"{index}.json" for index in range(len(given))]
        for file, table in zip(files, given, strict=True):
            write(file, table)
        monkeypatch.setattr(tables, "_shipped", lambda: files)

    forget()
    yield ship
    forget()


def test_every_table_of_the_package_can_be_read() -> None:
    found = [read(file) for file in tables._shipped()]
    assert found
    for table in found:
        assert table.rows
        assert table.gpu.bandwidth  # by which another GPU finds its nearest relative


def test_a_table_comes_back_as_it_was_written(tmp_path: Path) -> None:
    table = a_table(deepseek_v3={1: {DECODE: 3.25}, 4: {DECODE: 4.0, OPS: 70.0}})
    write(tmp_path / "table.json", table)
    again = read(tmp_path / "table.json")
    assert (again.gpu, again.made, again.rows) == (table.gpu, table.made, table.rows)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["table.json"]


def test_measured_and_between_and_beyond(shipped: Callable[..., None]) -> None:
    shipped(a_table(deepseek_v3={4: {DECODE: 2.0}, 16: {DECODE: 8.0}}))
    assert costs.expected(facts(), DECODE, 4) == (2.0, "measured on GPU X")
    assert costs.expected(facts(), DECODE, 8) == (4.0, "interpolated between M = 4 and 16 on GPU X")
    assert costs.expected(facts(), DECODE, 64) == (32.0, "extrapolated from M = 4 and 16 on GPU X")
    assert costs.expected(facts(), DECODE, 1) == (0.5, "extrapolated from M = 4 and 16 on GPU X")
    assert costs.expected(facts(), OPS, 4) is None
    assert costs.expected(facts(), OPS, 0) == (0.0, "nothing is launched")


def test_other_shapes_come_from_the_two_nearest(shipped: Callable[..., None]) -> None:
    near, far = {1: {DECODE: 2.0}}, {1: {DECODE: 50.0}}
    shipped(a_table(kimi_k2=near, glm_5={1: {DECODE: 4.0}}, mixtral_8x7b=far))
    cost = costs.expected(facts("mimo-v2.5-pro"), DECODE, 1)  # 6144 x 384: between kimi's 7168 and glm's 256
    assert cost is not None
    assert 2.0 < cost.us < 4.0
    assert cost.evidence == "interpolated from kimi_k2 and glm_5 on GPU X"
    assert costs.expected(facts_of(GPU, get_spec("minimax-m2"), torch.float32), DECODE, 1) is None


def test_of_two_shapes_as_near_the_one_with_the_same_kind_of_router_counts_more(shipped: Callable[..., None]) -> None:
    # trinity-mini is 2048 x 128 too, with sigmoid, bias and bfloat16 logits, as laguna-xs-2.1 is at 2048 x 256.
    shipped(a_table(laguna_xs_2_1={1: {DECODE: 2.0}}, qwen3_5_35b_a3b={1: {DECODE: 8.0}}))
    cost = costs.expected(facts("trinity-mini"), DECODE, 1)
    assert cost is not None
    assert 2.0 < cost.us < 3.9  # the mean of both would be 4
    assert cost.evidence.startswith("interpolated from laguna_xs_2_1 and")
    far = costs.expected(facts("qwen3-30b-a3b"), DECODE, 1)
    assert far is not None
    assert far.us > 4.1


def test_a_spec_that_differs_in_a_factor_alone_has_the_same_shape() -> None:
    spec = get_spec("deepseek-v3")
    other = dataclasses.replace(spec, routed_scaling_factor=1.5, renormalize_eps=0.0)
    assert shape_of(facts_of(GPU, other, torch.bfloat16)) == shape_of(facts())
    other = dataclasses.replace(spec, n_group=1, topk_group=1)
    assert shape_of(facts_of(GPU, other, torch.bfloat16)) != shape_of(facts())


def test_an_unknown_gpu_is_inferred_from_its_nearest_relative(shipped: Callable[..., None]) -> None:
    old, new = Machine("Old", (8, 0), 108, 2000.0), Machine("New", (10, 0), 148, 8000.0)
    small, large = Machine("Small", (9, 0), 114, 2000.0), Machine("Large", (9, 0), 132, 4800.0)
    shipped(*(a_table(gpu, deepseek_v3={1: {DECODE: 3.0}}) for gpu in (old, small, large, new)))

    def evidence(machine: Machine) -> str:
        cost = costs.expected(facts(machine=machine), DECODE, 1)
        assert cost is not None
        return cost.evidence

    assert evidence(described("sm_103")) == "inferred from New (sm_100), another GPU: measured there"
    assert evidence(described("sm_86")).startswith("inferred from Old")
    assert evidence(Machine("H100", (9, 0), 132, 3350.0)).startswith("inferred from Small")
    assert evidence(Machine("H20", (9, 0), 78, 4000.0)).startswith("inferred from Large")
    assert evidence(large) == "measured on Large"
    explanation = Plan(facts(machine=described("sm_103"))).explain(1)
    assert explanation.evidence.startswith("inferred from New")


def test_nothing_is_inferred_between_chips_with_and_without_early_starts(shipped: Callable[..., None]) -> None:
    gpu = Machine("Small", (9, 0), 114, 2000.0)
    shipped(a_table(gpu, deepseek_v3={1: {DECODE: 3.0}}))
    assert costs.expected(facts(machine=described("sm_89")), DECODE, 1) is None
    assert costs.expected(facts(machine=described("sm_100")), DECODE, 1) is not None


def test_the_fastest_that_keeps_the_contract_is_chosen(shipped: Callable[..., None]) -> None:
    pair = "flashinfer:cublas+fused_topk_deepseek"
    machine = dataclasses.replace(GPU, flashinfer="0.7.2")
    times = {DECODE: 9.0, OPS: 5.0, pair: 1.0}
    shipped(a_table(deepseek_v3={64: times, 256: {CUBLAS: 9.0, OPS: 12.0}, 4096: {CUBLAS: 90.0, OPS: 60.0}}))
    plan = Plan(facts(machine=machine))
    assert [plan.choice(tokens).candidate.backend for tokens in (1, 64, 65, 256, 4096)] == [
        "cuda",
        "cuda",  # whatever is faster up to 64 has other bits
        "cuda",
        "cuda",
        "torch",
    ]
    rejected = {entry.kernel: entry for entry in plan.explain(64).rejected}
    assert rejected["cublas+fused_topk_deepseek"].expected_us == 1.0
    assert "breaks a promise" in rejected["cublas+fused_topk_deepseek"].reason
    assert [(first, last) for first, last, candidate in plan.spans() if candidate.backend == "torch"][-1][1] is None


def test_router_gemm_runs_as_far_as_it_is_faster(shipped: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    slow, fast = {DECODE: 9.0, CUBLAS: 8.0}, {DECODE: 7.0, CUBLAS: 8.0}
    beyond = {CUBLAS: 9.0, OPS: 50.0}
    for times, most in (
        ({128: slow, 256: fast}, 64),
        ({128: fast, 256: slow}, 128),  # 192, interpolated, is as fast either way
        ({128: fast, 512: fast, 1024: slow}, 704),
        ({128: fast, 1024: fast}, 1024),
        ({64: {DECODE: 1.0}}, 64),  # nobody has measured how it goes on
        ({128: fast}, 128),
        ({128: {CUBLAS: 7.0}}, 64),
    ):
        shipped(a_table(deepseek_v3={**times, 4096: beyond}))
        plan = Plan(facts())
        assert policies.gemm_tokens(facts()) == most
        runs = [plan.explain(tokens).kernel for tokens in (1, 64, most, most + 1, 2048)]
        assert runs == ["router_gemm+select"] * 3 + ["cublas+select"] * 2
        spans = [(first, candidate.key(facts())) for first, _, candidate in plan.spans()]
        assert spans == [(1, DECODE), (most + 1, CUBLAS)]
        pretend(monkeypatch, HERE)
        router = planned.planned(CPU, get_spec("deepseek-v3"), torch.bfloat16)[1]
        assert isinstance(router, StandIn)
        assert router.gemm_tokens == most


def test_where_router_gemm_is_not_latency_a_shape_tells_of_another_by_its_work(shipped: Callable[..., None]) -> None:
    """qwen3-30b-a3b (2048 x 128) at 256 tokens has the work of glm-4.5-air (4096 x 128) at 128."""
    times = {64: {DECODE: 4.0}, 128: {DECODE: 7.0, CUBLAS: 8.0}, 256: {DECODE: 11.0, CUBLAS: 8.0}}
    shipped(a_table(glm_4_5_air=times))
    small = facts("qwen3-30b-a3b")
    found = [costs.expected(small, DECODE, tokens) for tokens in (64, 256)]
    assert [cost.us for cost in found if cost is not None] == [4.0, 7.0]
    cublas = costs.expected(small, CUBLAS, 256)
    assert cublas is not None
    assert cublas.us == 8.0
    assert (policies.gemm_tokens(facts("glm-4.5-air")), policies.gemm_tokens(small)) == (128, 256)


def test_a_shape_that_was_not_measured_needs_both_its_neighbours(shipped: Callable[..., None]) -> None:
    large = {128: {DECODE: 6.0, CUBLAS: 9.0}, 256: {DECODE: 7.0, CUBLAS: 9.0}}
    small = {128: {DECODE: 5.0, CUBLAS: 5.5}, 256: {DECODE: 7.0, CUBLAS: 8.0}}
    between = facts("llama-4-maverick")  # 5120 x 128
    shipped(a_table(glm_4_5_air=large, k_exaone_236b_a23b=large))
    assert policies.gemm_tokens(between) > 64
    shipped(a_table(glm_4_5_air=large, k_exaone_236b_a23b=small))  # cuBLAS may take 5.5 there
    assert policies.gemm_tokens(between) == 64


def test_times_beyond_those_measured_do_not_change_the_choice(shipped: Callable[..., None]) -> None:
    """From 62 to 180 and from 124 to 260 us: drawn on, the lines cross at some 20 000 tokens."""
    shipped(a_table(deepseek_v3={1024: {CUBLAS: 62.0, OPS: 124.0}, 4096: {CUBLAS: 180.0, OPS: 260.0}}))
    plan = Plan(facts())
    assert {candidate.backend for candidate in plan.candidates} == {"cuda"}
    explanation = plan.explain(1 << 20)
    torch_ops = next(entry for entry in explanation.rejected if entry.kernel == "mm+ops")
    assert explanation.expected_us is not None
    assert torch_ops.expected_us is not None
    assert torch_ops.expected_us < explanation.expected_us
    assert torch_ops.reason == "slower at the most tokens that were measured"


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_on_a_gpu_with_a_table_every_router_runs_on_the_kernels(weight: torch.dtype) -> None:
    gpus = [read(file).gpu for file in tables._shipped()]
    specs = {**SPECS, **{model.name: model.spec for model in catalog.models()}}
    for gpu in gpus:
        for name, spec in specs.items():
            if spec.weight_dtype in (None, str(weight).removeprefix("torch.")):
                plan = Plan(facts_of(gpu, spec, weight))
                assert {candidate.backend for candidate in plan.candidates} == {"cuda"}, (gpu.name, name)


def test_a_time_is_compared_with_a_time_only(shipped: Callable[..., None]) -> None:
    shipped(a_table(deepseek_v3={256: {OPS: 1.0}}))
    assert Plan(facts()).choice(256).candidate.backend == "cuda"


# A table in the user's folder.


HERE = dataclasses.replace(pretended((9, 0), None), name="GPU X", num_sms=100)


def own_file(table: Table) -> Path:
    path = tables.user_file("GPU X")
    write(path, table)
    forget()
    return path


def test_the_users_own_table_comes_first(shipped: Callable[..., None]) -> None:
    shipped(a_table(deepseek_v3={1: {DECODE: 3.0}}))
    own_file(a_table(deepseek_v3={1: {DECODE: 2.5}}))
    assert costs.expected(facts(machine=HERE), DECODE, 1) == (2.5, "measured on this GPU X")
    elsewhere = dataclasses.replace(HERE, device=None)
    assert costs.expected(facts(machine=elsewhere), DECODE, 1) == (3.0, "measured on GPU X")


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
    "no commit": (_text(lambda table: table["made"].pop("moegate_commit")), "made has no moegate_commit"),
    "text for a size": (_text(lambda table: table["rows"][0].update(gate_rows="256")), "gate_rows = '256'"),
    "no time": (_text(lambda table: table["rows"][0].update(us={DECODE: 0.0})), "a time that is none"),
    "no tokens": (_text(lambda table: table["rows"][0].update(tokens=0)), "0 tokens"),
    "other GPU": (_text(lambda table: table["gpu"].update(num_sms=78)), "is stale: it is of GPU X with 78"),
    "old": (_text(lambda table: table["made"].update(moegate="0.0.1")), "is stale: moegate 0.0.1 made it"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_or_stale_table_is_named_and_ignored(shipped: Callable[..., None], name: str) -> None:
    shipped(a_table(deepseek_v3={1: {DECODE: 3.0}}))
    path = own_file(a_table(deepseek_v3={1: {DECODE: 2.5}}))
    change, problem = BROKEN[name]
    path.write_text(change(path.read_text()))
    with pytest.warns(RuntimeWarning, match="it is ignored"):
        explanation = Plan(facts(machine=HERE)).explain(1)
    assert (explanation.expected_us, explanation.evidence) == (3.0, "measured on GPU X")
    (note,) = explanation.notes
    assert str(path) in note
    assert problem in note


def test_no_gpu_has_no_times() -> None:
    explanation = Plan(facts(machine=Machine("cpu", device=CPU))).explain(1)
    assert (explanation.expected_us, explanation.evidence) == (None, "nothing measured says anything about it")
