"""Machines that are not here, for tests of the choice."""

from __future__ import annotations

import pytest
import torch

from moegate import backends
from moegate.backends.flashinfer import limits
from moegate.backends.flashinfer import router as flashinfer_router
from moegate.backends.torch import TorchBackend
from moegate.choice import costs, planned, policies, tables
from moegate.choice.facts import Machine, described_machine

CPU = torch.device("cpu")


class StandIn(TorchBackend):
    """Takes the place of the cuda backend on a machine without a GPU."""

    name = "cuda"

    def __init__(self, gemm_tokens: int) -> None:
        self.gemm_tokens = gemm_tokens


def described(text: str, flashinfer: str | None = None) -> Machine:
    machine = described_machine(text)
    assert machine is not None
    return Machine(machine.name, machine.capability, flashinfer=flashinfer)


def pretended(
    capability: tuple[int, int], flashinfer: str | None, *, no_nvcc: str | None = None, name: str = "a GPU"
) -> Machine:
    """A machine whose "GPU" is the CPU, so that a gate there can run."""
    return Machine(name, capability, 148, None, flashinfer, None, no_nvcc, CPU)


def forget() -> None:
    """Empties everything that is kept for the process."""
    for known in (
        planned.planned,
        planned.router_of,
        backends.choose,
        tables.table_for,
        costs.expected,
        costs._curves,
        costs.most_tokens,
        costs.tells_of_not_frozen,
        policies.gemm_tokens,
        limits.installed_version,
        limits.cannot_compile,
    ):
        known.cache_clear()
    flashinfer_router._failures.clear()


def pretend(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    """Gates are made on this machine from now on, with PyTorch in the place of the cuda kernels."""
    forget()
    monkeypatch.setattr(planned, "machine_of", lambda device: machine)
    monkeypatch.setattr(planned, "CudaBackend", StandIn)
