"""`moegate explain`, on a machine without any of the GPUs and packages that it explains."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run
from machines import CPU, forget, pretend, pretended

import moegate
from moegate import Gate, RouterSpec, catalog, get_spec
from moegate.choice import costs
from moegate.choice.candidates import CANDIDATES, CUBLAS, Candidate
from moegate.halves import Call
from moegate.problem import Problem, problem_of
from moegate.routing import RouterTensors
from moegate.synthetic import random_gate

ASKED = ("explain", "deepseek-v3", "--device", "sm_103", "--tokens", "1,16,17")
KEYS = {"tokens", "backend", "kernel", "expected_us", "evidence", "rejected"}


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield
    forget()


def told(*arguments: object) -> list[dict[str, Any]]:
    result = run(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(result.stdout)
    assert all(set(row) >= KEYS for row in found)
    return found


def test_sglangs_rule_for_a_chip_that_is_not_here() -> None:
    found = told(*ASKED, "--installed", "flashinfer==0.6.8", "--policy", "sglang")
    assert [(row["tokens"], row["backend"], row["kernel"]) for row in found] == [
        (1, "flashinfer", "mm_M1_16_K7168_N256"),
        (16, "flashinfer", "mm_M1_16_K7168_N256"),
        (17, "torch", "mm+ops"),
    ]
    for row in found:
        assert len({(entry["backend"], entry["kernel"]) for entry in row["rejected"]}) == len(row["rejected"])
        assert len(row["rejected"]) == len(CANDIDATES) - 1
        assert all(entry["reason"] for entry in row["rejected"])


@pytest.mark.parametrize(
    ("more", "backend", "note"),
    [
        ((), "cuda", "FlashInfer is not installed"),
        (("--installed", "flashinfer-python==0.6.7"), "cuda", "0.6.7 is too old"),
        (("--installed", "flashinfer==0.6.8"), "flashinfer", None),
    ],
)
def test_what_is_installed_decides(more: tuple[str, ...], backend: str, note: str | None) -> None:
    row = told(*ASKED, "--policy", "sglang", *more)[0]
    assert row["backend"] == backend
    assert (note is None and row["notes"] == []) or note in row["notes"][0]


@pytest.mark.parametrize("frozen", [True, False])
def test_whose_plan_it_is_is_said(frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def expected(problem: Problem, candidate: Candidate, num_tokens: int) -> None:
        asked.append(problem.frozen)

    with monkeypatch.context() as patched:
        patched.setattr(costs, "expected", expected)
        printed = run(*ASKED, "--frozen" if frozen else "--not-frozen").stdout
    assert f"gate      {'frozen' if frozen else 'not frozen'}" in printed
    assert set(asked) == {frozen}


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("gpt-oss-120b", ()),
        ("deepseek-v3", ("--backend", "flashinfer", "--installed", "flashinfer==0.7.2")),
        ("kimi-k3", ("--policy", "sglang")),
    ],
)
def test_every_word_is_there_in_80_columns(model: str, more: tuple[str, ...]) -> None:
    tokens = "1,16,64,65,128,256,448,512,513,1024,4096"
    asked = ("explain", model, "--device", "sm_90", "--tokens", tokens, *more)
    printed = set(run(*asked, columns=80).stdout.split())
    for row in told(*asked):
        assert set(f"{row['evidence']} {row['why']}".split()) <= printed
        for entry in row["rejected"]:
            assert set(entry["reason"].split()) <= printed, entry
            assert entry["expected_us"] is None or f"{entry['expected_us']:.2f}" in printed


def test_for_people() -> None:
    result = run(*ASKED, "--installed", "flashinfer==0.6.8", columns=150)
    assert result.exit_code == 0
    for text in ("sm_103, compute capability 10.3", "FlashInfer 0.6.8", "inferred from NVIDIA", "µs"):
        assert text in result.stdout
    result = run(*ASKED, "--policy", "sglang", columns=150)
    assert "note      M = 1, 16: row 1 asks for mm_M1_16_K7168_N256: FlashInfer is not installed" in result.stdout


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("chip", ["sm_75", "sm_90", "sm_121"])
def test_every_router_of_the_catalog_has_a_plan(name: str, chip: str) -> None:
    for row in told("explain", name, "--device", chip, "--installed", "flashinfer==0.7.2"):
        aligned = get_spec(name).hidden_size % 8 == 0
        kernel = "router_gemm+select" if row["tokens"] <= 64 and aligned else "cublas+select"
        assert (row["backend"], row["kernel"]) == (("torch", "mm+ops") if chip == "sm_75" else ("cuda", kernel))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deepsek-v3",), "'deepsek-v3' is neither a name of the catalog nor a folder"),
        (("deepseek-v3", "--tokens", "1,-4"), "--tokens: got '1,-4'; allowed: numbers up to 1048576 with commas"),
        (("deepseek-v3", "--tokens", "9" * 24), "allowed: numbers up to 1048576 with commas"),
        (
            ("deepseek-ai/DeepSeek-V3",),
            "no folder deepseek-ai/DeepSeek-V3; did you mean 'deepseek-v3'? Nothing is down",
        ),
        (
            ("deepseek-v3", "--device", "sm_7"),
            "device = 'sm_7'; allowed here: cpu (PyTorch finds no GPU); or a GPU that need not be here: sm_70, ",
        ),
        (
            ("deepseek-v3", "--device", "sm_999"),
            "device = 'sm_999'; allowed here: cpu (PyTorch finds no GPU); or a GPU that need not be here: sm_70, ",
        ),
        (
            ("deepseek-v3", "--installed", "flashinfer==x"),
            "got 'flashinfer==x'; allowed: flashinfer==VERSION",
        ),
        (("deepseek-v3", "--installed", "vllm==1"), "installed: got 'vllm==1'; allowed: flashinfer==VERSION"),
        (
            ("deepseek-v3", "--device", "cpu", "--installed", "flashinfer==0.6.8"),
            "--installed: allowed with an NVIDIA GPU",
        ),
        (("deepseek-v3", "--policy", "x"), "policy: got 'x'; allowed: 'measured', 'sglang'"),
        (("deepseek-v3", "--device", "sm_75", "--backend", "cuda"), "compute capability 7.5 is below 8.0"),
        (("deepseek-v3", "--device", "sm_90", "--backend", "flashinfer"), "FlashInfer is not installed"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the messages name what a machine without a GPU has")
def test_wrong_arguments(arguments: tuple[str, ...], message: str) -> None:
    assert message in refused("explain", *arguments)


def test_a_folder_with_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(catalog.get_model("deepseek-v3").config))
    expected = told("explain", "deepseek-v3", "--device", "sm_90")
    for source in (tmp_path, tmp_path / "config.json"):
        assert told("explain", source, "--device", "sm_90") == expected


def test_where_the_two_gemms_change_is_said() -> None:
    (row,) = told("explain", "deepseek-v3", "--device", "sm_90", "--tokens", "65")
    assert "router_gemm up to 64 tokens and cuBLAS beyond" in row["why"]


# `Gate.explain`, the log and the warnings.


def test_a_gate_explains_itself_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    spec = RouterSpec(hidden_size=64, num_experts=16, top_k=2)
    with caplog.at_level(logging.INFO, logger="moegate"):
        gate = random_gate(spec)
        gate.refresh()
    assert [record.getMessage() for record in caplog.records] == [
        "gate 64 x 16, top 2 on cpu: M 1 and more torch mm+ops (measured)"
    ]
    explanation = gate.explain(3)
    assert (explanation.tokens, explanation.backend, explanation.kernel) == (3, "torch", "mm+ops")
    first, *others = str(explanation).splitlines()
    assert first == f"3 tokens: torch mm+ops, no known time ({explanation.evidence}); {explanation.why}"
    assert len(others) == len(explanation.rejected) + len(explanation.notes) > 0
    assert others[0] == "  not cuda router_gemm+select, no known time: " + explanation.rejected[0].reason
    with pytest.raises(TypeError, match="num_tokens: got str; allowed: an int"):
        gate.explain("16")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="num_tokens: got bool; allowed: an int"):
        gate.explain(True)
    with pytest.raises(ValueError, match="num_tokens: got -1; allowed: 0 or more"):
        gate.explain(-1)


def test_a_slow_path_warns_once_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RouterSpec(hidden_size=64, num_experts=16, top_k=2)
    no_compiler = dataclasses.replace(pretended((9, 0), None), no_nvrtc="no NVRTC: `pip install it`")
    pretend(monkeypatch, no_compiler)
    message = "the cuda backend cannot run on a GPU: no NVRTC: `pip install it`"
    with pytest.warns(RuntimeWarning, match=message) as seen:
        gates = [random_gate(spec) for _ in range(3)]
    assert len(seen) == 1
    assert gates[0].explain(1).backend == "torch"


def test_route_warns_of_a_slow_path_too(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RouterSpec(hidden_size=64, num_experts=16, top_k=2)
    pretend(monkeypatch, dataclasses.replace(pretended((9, 0), None), no_nvrtc="no NVRTC: `pip install it`"))
    with pytest.warns(RuntimeWarning, match="cannot run on a GPU: no NVRTC") as seen:
        _ = [moegate.route(torch.zeros(2, 64), torch.zeros(16, 64), spec) for _ in range(3)]
    assert len(seen) == 1


def test_router_gemm_warns_of_a_k_that_its_kernel_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(pretended((9, 0), None), RouterSpec(63, 4, 1), torch.float32)
    hidden, weight = torch.ones(2, 63), torch.ones(4, 63)
    with pytest.warns(RuntimeWarning, match="K = 63 is not a multiple of 8") as seen:
        bound = [CUBLAS.gemm.bind(problem, CPU) for _ in range(2)]
    assert len([each for each in seen if "multiple of 8, which" in str(each.message)]) == 1
    call = Call(2, hidden, weight, RouterTensors(), None, None, {}, None, 0)
    assert bound[1].logits(call).tolist() == [[63.0] * 4] * 2


def test_the_log_names_the_mix_of_a_plan(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pretend(monkeypatch, pretended((9, 0), None))
    spec = get_spec("deepseek-v3")
    weight, bias = torch.zeros(256, 7168, dtype=torch.bfloat16), torch.zeros(256)
    with caplog.at_level(logging.INFO, logger="moegate"):
        gate = Gate(spec, weight, e_score_correction_bias=bias, policy="sglang")
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith("M 1 to 16 cuda router_gemm+select, M 17 and more torch mm+ops (sglang)")
    assert "backend='cuda+torch'" in repr(gate) or "backend='torch+cuda'" in repr(gate)
    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(4, 7168).bfloat16()
    assert compiled(hidden).topk_ids.equal(gate(hidden).topk_ids)


def test_asking_about_another_gpu_starts_none() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); from moegate.cli import app; "
        "app(['explain', 'qwen3-30b-a3b', '--device', 'sm_100'], standalone_mode=False); "
        "new = {name for name in set(sys.modules) - before if name.startswith(('cuda.bindings', 'flashinfer'))}; "
        "assert not new, new; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
