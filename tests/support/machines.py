"""Described and pretended machines, for tests of the choice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from moegate.choice import dispatch, policies
from moegate.choice.candidates import CANDIDATES
from moegate.choice.machines import described_machine
from moegate.flashinfer import functions, limits
from moegate.gemm.torch_mm import TorchMm
from moegate.machine import Machine
from moegate.selection.torch_ops import TorchOps

CPU = torch.device("cpu")


def described(text: str, flashinfer: str | None = None) -> Machine:
    machine = described_machine(text)
    assert machine is not None
    return Machine(machine.name, machine.capability, flashinfer=flashinfer)


def pretended(
    capability: tuple[int, int], flashinfer: str | None, *, no_nvcc: str | None = None, name: str = "a GPU"
) -> Machine:
    """A machine whose "GPU" is the CPU, so that gates can run."""
    return Machine(name, capability, 148, None, flashinfer, None, no_nvcc, CPU)


def forget() -> None:
    """Empties all caches of the process."""
    dispatch.forget()
    limits.installed_version.cache_clear()
    limits.cannot_compile.cache_clear()
    functions.forget_failures()


def pretend(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """From now on, gates are made for this machine, and PyTorch's operations replace the CUDA kernels."""
    forget()
    monkeypatch.setattr(dispatch, "machine_of", lambda device: machine)
    for candidate in CANDIDATES:
        if candidate.backend == "cuda":
            monkeypatch.setattr(type(candidate.gemm), "bind", TorchMm.bind)
            monkeypatch.setattr(type(candidate.selection), "bind", TorchOps.bind)


@contextmanager
def router_gemm_up_to(num_tokens: int) -> Iterator[None]:
    """Overrides the cost table's choice between router_gemm and cuBLAS."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policies, "gemm_tokens", cache(lambda problem: num_tokens))
        dispatch.forget()
        yield
    dispatch.forget()
