"""FlashInfer as a backend, with a stand-in for the package: when it runs, when it does not, and the reasons."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from command_line import run
from machines import CPU, forget, pretend, pretended
from torch import Tensor

import moegate
from moegate import Gate, get_spec
from moegate.choice import machines
from moegate.flashinfer import functions, limits
from moegate.machine import Machine
from moegate.synthetic import random_hidden, random_tensors

SPEC = get_spec("deepseek-v3")
WEIGHT, TENSORS = random_tensors(SPEC)
BIAS = TENSORS.e_score_correction_bias


class Package:
    """A FlashInfer made of PyTorch operations, which counts its calls and fails on request."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.failure: Exception | None = None

    def gemm(self, hidden: Tensor, weight: Tensor, out: Tensor, launch_with_pdl: bool = True) -> None:
        self._called("mm", hidden)
        assert hidden.is_contiguous()
        assert weight.t().is_contiguous()
        out.copy_(hidden.float() @ weight.float())

    def top_k(self, logits: Tensor, bias: Tensor, *settings: Any, **_: bool) -> None:
        _, _, k, scale, values, ids = settings
        self._called("top_k", logits)
        routing = moegate.select(logits, SPEC, e_score_correction_bias=bias)
        ids.copy_(routing.topk_ids)
        values.copy_(routing.topk_weights)
        assert (k, scale) == (SPEC.top_k, SPEC.routed_scaling_factor)

    def _called(self, name: str, rows: Tensor) -> None:
        if self.failure is not None:
            raise self.failure
        self.calls.append((name, rows.shape[0]))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Package]:
    fake = Package()
    modules = {name: ModuleType(name) for name in ("flashinfer", "flashinfer.gemm", "flashinfer.fused_moe")}
    vars(modules["flashinfer.gemm"])["mm_M1_16_K7168_N256"] = fake.gemm
    vars(modules["flashinfer.fused_moe"])["fused_topk_deepseek"] = fake.top_k
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    yield fake
    forget()


def a_gate(**options: Any) -> Gate:
    return Gate(SPEC, WEIGHT, e_score_correction_bias=BIAS, **options)


def test_the_rule_runs_flashinfer_and_what_the_rule_says_beyond_it(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, pretended((10, 3), "0.6.8"))
    gate = a_gate(policy="sglang")
    package.calls.clear()
    plain = a_gate(backend="torch")
    for tokens in (1, 16, 17, 0, 3):
        hidden = random_hidden(SPEC, tokens)
        got, expected = gate(hidden, return_logits=True), plain(hidden, return_logits=True)
        assert got.topk_ids.equal(expected.topk_ids)
        assert got.logits is not None
        assert got.logits.dtype == torch.float32
        torch.testing.assert_close(got.topk_weights, expected.topk_weights)
    assert package.calls == [("mm", 1), ("mm", 16), ("mm", 3)]
    gate(random_hidden(SPEC, 2).half())
    assert len(package.calls) == 3, "FlashInfer was given float16"
    explanation = gate.explain(16)
    assert (explanation.backend, explanation.kernel) == ("flashinfer", "mm_M1_16_K7168_N256")
    assert gate.explain(17).backend == "torch"


def test_forced_it_brings_its_own_top_k(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, pretended((10, 3), "0.7.2"))
    gate = a_gate(backend="flashinfer")
    package.calls.clear()
    hidden = random_hidden(SPEC, 20)
    assert gate(hidden).topk_ids.equal(a_gate(backend="torch")(hidden).topk_ids)
    assert package.calls == [("top_k", 20)]
    routing = moegate.route(hidden[:2], WEIGHT, SPEC, e_score_correction_bias=BIAS, backend="flashinfer")
    assert routing.topk_ids.equal(gate(hidden).topk_ids[:2])


def test_rows_that_are_apart_are_copied(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, pretended((10, 3), "0.6.8"))
    gate = a_gate(policy="sglang")
    wide = torch.zeros(4, 2 * SPEC.hidden_size, dtype=torch.bfloat16)
    wide[:, : SPEC.hidden_size] = random_hidden(SPEC, 4)
    with pytest.warns(RuntimeWarning, match="hidden is copied in every call"):
        got = gate(wide[:, : SPEC.hidden_size])
    assert got.topk_ids.equal(gate(random_hidden(SPEC, 4)).topk_ids)


FAILURES = [
    (RuntimeError("Ninja build failed:\nnvcc: not found"), "RuntimeError: Ninja build failed: nvcc: not found"),
    (ImportError("libtvm_ffi.so"), "ImportError: libtvm_ffi.so"),
]


@pytest.mark.parametrize(("failure", "reason"), FAILURES)
def test_a_jit_that_fails_is_named_and_the_next_row_runs(
    package: Package, monkeypatch: pytest.MonkeyPatch, failure: Exception, reason: str
) -> None:
    pretend(monkeypatch, pretended((10, 3), "0.6.8"))
    package.failure = failure
    with pytest.warns(RuntimeWarning, match=reason) as caught:
        gates = [a_gate(policy="sglang") for _ in range(3)]
    assert len([warning for warning in caught if reason in str(warning.message)]) == 1
    explanation = gates[0].explain(1)
    assert explanation.backend == "cuda"
    assert reason in explanation.notes[0]
    assert any(reason in rejected.reason for rejected in explanation.rejected if rejected.backend == "flashinfer")
    assert gates[0](random_hidden(SPEC, 1)).topk_ids.shape == (1, 8)
    with pytest.raises(ValueError, match=reason):
        a_gate(backend="flashinfer")


def test_the_command_tries_what_the_plan_would_run(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = pretended((10, 3), "0.6.8")
    pretend(monkeypatch, machine)
    monkeypatch.setattr(machines, "machine_of", lambda device: machine)
    package.failure = RuntimeError("no nvcc")
    told = json.loads(run("explain", "deepseek-v3", "--policy", "sglang", "--tokens", "1", "--json").stdout)
    assert (told[0]["backend"], told[0]["notes"][0].endswith("mm_M1_16_K7168_N256 failed: RuntimeError: no nvcc")) == (
        "cuda",
        True,
    )
    assert json.loads(run("explain", "deepseek-v3", "--tokens", "1", "--json").stdout)[0]["backend"] == "cuda"
    as_if = ("--installed", "flashinfer==0.7.0", "--policy", "sglang", "--tokens", "1", "--json")
    forget()
    assert json.loads(run("explain", "deepseek-v3", *as_if).stdout)[0]["backend"] == "flashinfer"


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (pretended((10, 3), None), "FlashInfer is not installed"),
        (pretended((10, 3), "0.6.7"), "FlashInfer 0.6.7 is too old"),
        (pretended((10, 3), "0.6.8", no_nvcc="finds no nvcc"), "finds no nvcc"),
    ],
)
def test_without_it_nothing_is_imported(monkeypatch: pytest.MonkeyPatch, machine: Machine, reason: str) -> None:
    pretend(monkeypatch, machine)
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # an import raises
    with pytest.warns(RuntimeWarning, match=reason):
        explanation = a_gate(policy="sglang").explain(1)
    assert explanation.backend == "cuda"
    assert reason in explanation.notes[0]
    with pytest.raises(ValueError, match=f"backend: got 'flashinfer', which cannot route 1 tokens.*{reason}"):
        a_gate(backend="flashinfer")


def test_by_default_it_is_compared_and_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, pretended((9, 0), "0.7.2.post1", name="NVIDIA H200"))
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    explanation = a_gate().explain(1)
    assert explanation.backend == "cuda"
    rejected = {entry.kernel: entry for entry in explanation.rejected}
    pair = rejected["mm_M1_16_K7168_N256+fused_topk_deepseek"]
    assert pair.expected_us is not None
    assert pair.reason.startswith("breaks a promise")


def test_the_version_is_read_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        assert name == "flashinfer-python"
        return "0.7.1"

    forget()
    monkeypatch.setattr(importlib.metadata, "version", version)
    assert limits.installed_version() == "0.7.1"
    forget()


def test_the_compiler_is_looked_for_where_flashinfer_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_HOME", "CUDA_PATH", "FLASHINFER_NVCC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    forget()
    reason = limits.cannot_compile()
    assert reason is not None
    assert f"finds no nvcc ({tmp_path / 'bin' / 'nvcc'})" in reason
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    forget()
    assert limits.cannot_compile() is None
    forget()


def test_a_machine_without_a_gpu_refuses_what_is_forced() -> None:
    forget()
    assert machines.machine_of(CPU).capability is None
    for backend in ("cuda", "flashinfer"):
        with pytest.raises(ValueError, match=f"backend: got '{backend}', which cannot route 1 tokens.*no NVIDIA GPU"):
            a_gate(backend=backend)
    with pytest.raises(ValueError, match="backend: got 'cutlass'; allowed: None, 'cuda', 'torch', 'flashinfer'"):
        a_gate(backend="cutlass")
    with pytest.raises(ValueError, match="policy: got 'vllm'; allowed: 'measured', 'sglang'"):
        a_gate(policy="vllm")
    with pytest.raises(ValueError, match="policy: got 'sglang' with backend = 'torch'; allowed: one of the two"):
        a_gate(policy="sglang", backend="torch")


def test_flashinfer_is_asked_whether_it_supports_the_chip(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def supported(number: int) -> bool:
        asked.append(number)
        return number == 103

    vars(sys.modules["flashinfer.gemm"])["mm_M1_16_K7168_N256"] = function = ModuleType("mm")
    vars(function)["is_compute_capability_supported"] = supported
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, device.index))
    gemm = limits.GEMMS[7168, 256]
    found: object = functions._find(gemm, torch.device("cuda", 3))
    assert found is function
    with pytest.raises(RuntimeError, match="FlashInfer says that it does not support sm_100"):
        functions._find(gemm, torch.device("cuda", 0))
    assert asked == [103, 100]
