"""Machines: the one that is here, and those that are only described."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import torch
from packaging.version import InvalidVersion, Version

from moegate.choice.chips import chip
from moegate.cuda import jit
from moegate.flashinfer import limits
from moegate.machine import Machine

_DESCRIBED = re.compile(r"sm_(\d{1,2})(\d)[af]?")
CHIPS = {70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121}  # that exist, as of CUDA 13
_INSTALLED = re.compile(r"flashinfer(?:-python)?==(\S+)")


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


def _bandwidth(properties: object) -> float | None:
    """GB/s from the clock in kHz and the width in bits, twice a clock; newer PyTorch tells them."""
    clock = getattr(properties, "memory_clock_rate", None)
    width = getattr(properties, "memory_bus_width", None)
    return None if not clock or not width else round(2 * clock * 1e3 * width / 8 / 1e9, 1)
