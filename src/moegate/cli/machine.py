"""Describes this machine: CPU, GPUs, versions."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch


def pick_device(name: str | None) -> torch.device:
    """The device of that name, after a test that it works; None: the GPU if there is one.

    Raises:
        ValueError: There is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError):  # PyTorch built without CUDA asserts
        allowed = ", ".join(str(device) for device in devices())
        other = other_accelerator()
        allowed += "" if other is None else f", {other}"
        gpus = "" if torch.cuda.is_available() or other is not None else " (PyTorch finds no GPU)"
        raise ValueError(f"device = {name!r}; allowed here: {allowed}{gpus}") from None
    return device


def devices() -> list[torch.device]:
    """The CPU and every GPU."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def other_accelerator() -> str | None:
    """PyTorch's accelerator, if it is not "cuda" (NVIDIA and AMD): "mps", "xpu", ...; None: there is none."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type == "cuda" else found.type


def device_name(device: torch.device) -> str:
    """A device's name for users: "NVIDIA H200", or the CPU with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def cpu_name() -> str:
    """The CPU's name, from /proc/cpuinfo or Python's platform module."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine() -> dict[str, Any]:
    """The properties that decide which backends run, and how fast."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "accelerator": other_accelerator(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }
