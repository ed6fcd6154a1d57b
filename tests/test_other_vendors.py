"""Messages about GPUs of other vendors, and the GEMM on AMD's, with a stand-in for an AMD GPU."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
import torch
from command_line import run
from routers import generator
from torch import Tensor

from moegate.choice.candidates import ROUTER_GEMM
from moegate.choice.machines import machine_of
from moegate.cli import check, machine
from moegate.cuda.device import unsupported
from moegate.gemm import torch_mm
from moegate.problem import problem_of
from moegate.spec import RouterSpec

SPEC = RouterSpec(64, 16, 2)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="pretends that this machine has an AMD GPU")


class OnGpu(Tensor):
    """A tensor on the CPU that claims to be on a GPU; PyTorch calls AMD's GPUs "cuda", too."""

    is_cuda = True
    is_cpu = False


@pytest.fixture
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4.43482")
    monkeypatch.setattr(torch.version, "cuda", None)
    machine_of.cache_clear()
    torch_mm._widens_on_amd.cache_clear()


@pytest.mark.usefixtures("amd")
def test_an_amd_gpu_is_called_one() -> None:
    device = torch.device("cuda", 0)
    reason = unsupported(machine_of(device))
    assert reason is not None
    assert "AMD GPU" in reason
    refused = ROUTER_GEMM.unsupported(problem_of(machine_of(device), SPEC, torch.bfloat16), 1)
    assert refused is not None
    assert "AMD GPU" in refused
    machine_of.cache_clear()


def test_other_devices_are_not_called_amd() -> None:
    for name in ("cpu", "mps", "xpu"):
        assert unsupported(machine_of(torch.device(name))) == f"{name} is no NVIDIA GPU"


@pytest.mark.usefixtures("amd")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
def test_gemms_where_mm_cannot_widen(dtype: torch.dtype, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ROCm builds of torch 2.8: within the error of a float32 GEMM, with one warning."""

    def refuse(*arguments: object, **named: object) -> NoReturn:
        raise RuntimeError("out_dtype is only supported for CUDA")

    monkeypatch.setattr(torch, "mm", refuse)
    hidden = torch.randn(5, 64, generator=generator(0)).to(dtype).as_subclass(OnGpu)
    weight = torch.randn(16, 64, generator=generator(1)).to(dtype).as_subclass(OnGpu)
    given = torch.randn(16, generator=generator(2)).as_subclass(OnGpu) if bias else None
    with pytest.warns(RuntimeWarning, match="out_dtype is only supported for CUDA") as seen:
        found = [torch_mm.router_gemm(hidden, weight, given, torch.float32) for _ in range(2)]
    assert len([each for each in seen if each.category is RuntimeWarning]) == 1
    plain = [part.as_subclass(Tensor).double() for part in (found[1], hidden, weight)]
    exact = plain[1] @ plain[2].T + (0 if given is None else given.as_subclass(Tensor).double())
    # 64 products of about 1 in float32, whose unit roundoff is 2**-24.
    assert torch.allclose(plain[0], exact, rtol=0, atol=64 * 2**-22)
    torch_mm._widens_on_amd.cache_clear()


@pytest.mark.usefixtures("amd")
def test_where_mm_can_widen_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def mm(one: Tensor, other: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        asked.append(out_dtype)
        return one.float() @ other.float()

    monkeypatch.setattr(torch, "mm", mm)
    hidden, weight = (torch.ones(rows, 64, dtype=torch.bfloat16).as_subclass(OnGpu) for rows in (2, 3))
    for _ in range(2):
        assert torch_mm.router_gemm(hidden, weight, None, torch.float32).tolist() == [[64.0] * 3] * 2
    assert asked == [torch.float32] * 3  # one try, then each GEMM
    torch_mm._widens_on_amd.cache_clear()


def test_check_names_rocm_and_other_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MODELS", ("qwen3-30b-a3b",))
    monkeypatch.setattr(check, "TOKENS", (1,))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "ROCm 6.4" in run("check").stdout
    monkeypatch.setattr(machine, "other_accelerator", lambda: "mps")
    printed = run("check").stdout
    assert "gpu       mps" in printed
    assert "none that PyTorch can use" not in printed
