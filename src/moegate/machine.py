"""A machine, as far as the choice of kernels depends on it. None of it needs a GPU to be described."""

from __future__ import annotations

from dataclasses import dataclass

import torch


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

    def __hash__(self) -> int:
        """Of what tells machines apart; every problem has its machine's in its own."""
        return hash((self.name, self.flashinfer, self.device))

    @property
    def sm(self) -> int:
        """The compute capability as one number: 103 for 10.3; 0 without an NVIDIA GPU."""
        return 0 if self.capability is None else 10 * self.capability[0] + self.capability[1]
