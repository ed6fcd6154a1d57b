"""The properties of a machine that decide which kernels run. A description needs no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """One device and the software installed for it."""

    name: str
    """The GPU's name; "sm_103" for a GPU described by its architecture; "cpu", ... for other devices."""
    capability: tuple[int, int] | None = None
    """The compute capability; None: no NVIDIA GPU."""
    num_sms: int | None = None
    """Multiprocessors; None: not known."""
    bandwidth: float | None = None
    """Memory bandwidth in GB/s, from the memory's clock and width; None: not known."""
    flashinfer: str | None = None
    """FlashInfer's version; None: it is not installed."""
    no_nvrtc: str | None = None
    """Why the kernels of the cuda backend cannot be compiled; None: they can."""
    no_nvcc: str | None = None
    """Why FlashInfer cannot compile its kernels; None: it can."""
    device: torch.device | None = None
    """The device itself, on which kernels can be tried out; None: the machine is only described."""

    def __hash__(self) -> int:
        """Of what tells machines apart; every problem has its machine's in its own."""
        return hash((self.name, self.flashinfer, self.device))

    @property
    def sm(self) -> int:
        """The compute capability as one number: 103 for 10.3; 0 without an NVIDIA GPU."""
        return 0 if self.capability is None else 10 * self.capability[0] + self.capability[1]
