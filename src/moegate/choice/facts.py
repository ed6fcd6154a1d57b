"""What the choice of a kernel depends on: the machine and the problem. Neither needs a GPU to be described."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

import torch
from packaging.version import InvalidVersion, Version

from moegate.backends.cuda import jit
from moegate.backends.flashinfer import limits
from moegate.choice.chips import chip
from moegate.spec import RouterSpec

_DESCRIBED = re.compile(r"sm_(\d{1,2})(\d)[af]?")
CHIPS = {70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121}  # that exist, as of CUDA 13
_INSTALLED = re.compile(r"flashinfer(?:-python)?==(\S+)")


@dataclass(frozen=True)
class Machine:
    """One device, with what is installed around it."""

    name: str
    """The GPU's name; "sm_103" for one that is only described; "cpu", ... for what is no NVIDIA GPU."""
    capability: tuple[int, int] | None = None
    """The compute capability; None: no NVIDIA GPU."""
    num_sms: int | None = None
    """Multiprocessors; None: not known."""
    bandwidth: float | None = None
    """Of the memory, in GB/s by its clock and width; None: not known."""
    flashinfer: str | None = None
    """FlashInfer's version; None: it is not installed."""
    no_nvrtc: str | None = None
    """Why the kernels of the cuda backend cannot be compiled; None: they can."""
    no_nvcc: str | None = None
    """Why FlashInfer cannot compile its kernels; None: it can."""
    device: torch.device | None = None
    """Where things can be tried out; None: the machine is only described."""

    @property
    def sm(self) -> int:
        """The compute capability as one number: 103 for 10.3; 0 without an NVIDIA GPU."""
        return 0 if self.capability is None else 10 * self.capability[0] + self.capability[1]


@dataclass(frozen=True)
class Facts:
    """A problem on a machine; the number of tokens is what a plan is asked with."""

    machine: Machine
    spec: RouterSpec
    hidden: torch.dtype
    """Of the hidden states."""
    weight: torch.dtype
    bias: torch.dtype | None = None
    """Of the linear bias, where the spec has one."""
    frozen: bool = True
    """The gate's weight is declared constant, so that calls may load it early."""


@cache
def machine_of(device: torch.device) -> Machine:
    """The machine around a device that is here."""
    if device.type == "cuda" and torch.version.hip is not None:
        return Machine("an AMD GPU", device=device)
    if device.type != "cuda" or torch.version.cuda is None:
        return Machine(device.type, device=device)
    properties = torch.cuda.get_device_properties(device)
    return Machine(
        properties.name,
        (properties.major, properties.minor),
        properties.multi_processor_count,
        _bandwidth(properties),
        limits.installed_version(),
        jit.missing_compiler(),
        limits.cannot_compile(),
        device,
    )


def described_machine(text: str) -> Machine | None:
    """A GPU by its architecture, such as "sm_103", or its name, such as "RTX 5090"; None: no such GPU.

    Everything that is installed can be compiled for it.
    """
    named = chip(text)
    if named is not None:
        return Machine(f"NVIDIA {named.name}", named.capability, named.num_sms, named.bandwidth)
    found = _DESCRIBED.fullmatch(text.strip().lower())
    if found is None or int(found[1] + found[2]) not in CHIPS:
        return None
    return Machine(text.strip().lower(), (int(found[1]), int(found[2])))


def with_installed(machine: Machine, text: str) -> Machine:
    """The machine as it would be with this installed: "flashinfer==0.6.8".

    Raises:
        ValueError: Another text.
    """
    found = _INSTALLED.fullmatch(text.strip())
    try:
        version = Version(found[1]) if found is not None else None
    except InvalidVersion:
        version = None
    if found is None or version is None:
        raise ValueError(f"installed: got {text!r}; allowed: flashinfer==VERSION")
    return replace(machine, flashinfer=found[1])


def facts_of(
    machine: Machine, spec: RouterSpec, weight: torch.dtype, bias: torch.dtype | None = None, *, frozen: bool = True
) -> Facts:
    """The problem of a gate: hidden states in its weight's dtype, bfloat16 beside a float32 weight.

    `bias` is the dtype of the linear bias; None: that of the hidden states, if the spec has a bias.
    """
    hidden = weight if weight != torch.float32 else torch.bfloat16
    return Facts(machine, spec, hidden, weight, (bias or hidden) if spec.linear_bias else None, frozen)


def default_weight_dtype(spec: RouterSpec) -> torch.dtype:
    """The dtype of a gate's weight where nobody says another: bfloat16, unless the spec pins it."""
    return torch.float32 if spec.weight_dtype == "float32" else torch.bfloat16


def _bandwidth(properties: object) -> float | None:
    """GB/s from the clock in kHz and the width in bits, twice a clock; newer PyTorch tells them."""
    clock = getattr(properties, "memory_clock_rate", None)
    width = getattr(properties, "memory_bus_width", None)
    return None if not clock or not width else round(2 * clock * 1e3 * width / 8 / 1e9, 1)
