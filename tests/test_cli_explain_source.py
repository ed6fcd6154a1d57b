"""`moegate explain --source`: the very kernels that would run, of a GPU that is not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run
from cuda_kernels import a_problem
from machines import forget

from moegate import get_spec
from moegate.choice.candidates import CUBLAS, DOT_GEMM, ROUTER_GEMM, Candidate
from moegate.cuda import device as gpu
from moegate.cuda import jit
from moegate.cuda.device import Chip
from moegate.problem import dtypes_of

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(jit.missing_compiler() is not None, reason=str(jit.missing_compiler())),
]
H100 = Chip(132, True, 227 << 10)


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()


def told(*arguments: str) -> list[dict[str, Any]]:
    result = run("explain", *arguments, "--source", "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


def test_kernels_of_a_gpu_that_is_not_here() -> None:
    few, many, none = told("minimax-m2", "--device", "H100", "--tokens", "1,512,0")
    assert [each["kernel"] for each in few["kernels"]] == ["gemm_1", "select_few"]
    assert [each["kernel"] for each in many["kernels"]] == ["prepare_operands", "cuBLAS", "select_some"]
    assert none["kernels"] == []
    for each in (*few["kernels"], *many["kernels"]):
        assert each["arch"] == "sm_90a"
        if each["kernel"] != "cuBLAS":
            assert 16 <= each["registers"] <= 255
            assert f"{each['kernel']}(const __grid_constant__" in each["text"]
            assert f'#include "{each["header"]}"' in each["text"]
    assert "num_splits 2, num_terms 3" in many["kernels"][1]["plan"]
    assert "in clusters of 4" in few["kernels"][0]["plan"]
    printed = run("explain", "minimax-m2", "--device", "H100", "--tokens", "1,512", "--source").stdout
    assert printed.count("The text that instantiates select.cuh") == 2  # on logits, and on partial sums
    assert printed.count("The text that instantiates router_gemm.cuh") == 1


@pytest.mark.parametrize("model", ["deepseek-v3", "minimax-m2", "gemma-4-26b-a4b", "gpt-oss-120b", "inkling"])
@pytest.mark.parametrize(("candidate", "tokens"), [(ROUTER_GEMM, 1), (ROUTER_GEMM, 100), (CUBLAS, 100), (CUBLAS, 5000)])
def test_the_text_is_the_one_that_is_loaded(
    candidate: Candidate, tokens: int, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernel, with its shared memory, is among those that are made of the text."""
    made: dict[str, set[tuple[str, int]]] = {}

    class Module:
        def __init__(self, text: str) -> None:
            self.kernels = made.setdefault(text, set())

        def kernel(self, name: str, fields: str, threads: int, *, shared_bytes: int = 0, **_: object) -> None:
            self.kernels.add((name, shared_bytes))

    monkeypatch.setattr(jit, "load", lambda text, *_: Module(text))
    monkeypatch.setattr(gpu, "chip_of", lambda *_: H100)
    spec = get_spec(model)
    problem = a_problem(spec, dtypes_of(spec, torch.float32 if spec.weight_dtype == "float32" else torch.bfloat16))
    gemm = candidate.gemm.bind(problem, torch.device("cpu"))
    candidate.selection.bind(problem, torch.device("cpu"), gemm)
    for source in candidate.sources(problem, H100, tokens):
        assert source.kernel == "cuBLAS" or (source.kernel, source.shared_bytes) in made[source.text], source.kernel


def test_a_kernel_that_is_not_chosen_has_its_text_too() -> None:
    spec = get_spec("minimax-m2")
    problem = a_problem(spec, dtypes_of(spec, torch.float32))
    dot, select = DOT_GEMM.sources(problem, H100, 3)
    assert (dot.kernel, dot.header, select.kernel) == ("dot_4", "dot_gemm.cuh", "select_few")
    assert {use.name for use in jit.kernel_uses(dot.text, "sm_90a")} == {"dot_1", "dot_2", "dot_4"}


def test_newer_chips_get_ptx() -> None:
    (row,) = told("deepseek-v3", "--device", "sm_121", "--tokens", "1")
    assert {each["arch"] for each in row["kernels"]} <= {"sm_121a", "compute_90"}


def test_an_unknown_number_of_multiprocessors_is_assumed_and_said() -> None:
    said = "The number of multiprocessors of {} is unknown; assumed: {}"
    for device, name, num_sms in (("B300", "NVIDIA B300", 148), ("sm_103", "sm_103", 148), ("sm_80", "sm_80", 108)):
        (row,) = told("deepseek-v3", "--device", device, "--tokens", "1")
        assert {each["num_sms"] for each in row["kernels"]} == {num_sms}
        printed = run("explain", "deepseek-v3", "--device", device, "--tokens", "1", "--source").stdout
        assert said.format(name, num_sms) in printed
    assert "is unknown" not in run("explain", "deepseek-v3", "--device", "B200", "--tokens", "1", "--source").stdout


def test_without_a_gpu_to_ask_about_there_are_no_kernels() -> None:
    assert "--source: cpu is no NVIDIA GPU; allowed: --device with" in refused(
        "explain", "deepseek-v3", "--device", "cpu", "--source"
    )
    (row,) = told("deepseek-v3", "--device", "H100", "--backend", "torch", "--tokens", "1")
    assert row["kernels"] == []
