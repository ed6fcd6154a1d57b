"""The two halves of a route, a GEMM and a selection: what each way to compute one of them says of itself.

A way is stateless. `bind` makes it run for one problem on one device; what is bound holds kernels and no tensors, so
that all gates with the same problem share it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moegate.cuda.device import Chip
from moegate.problem import Problem
from moegate.routing import RouterTensors, Routing


class Call(NamedTuple):
    """What one call brings, checked."""

    num_tokens: int
    """M."""
    hidden: Tensor
    """[M, K]."""
    weight: Tensor
    """[R, K]."""
    tensors: RouterTensors
    input_ids: Tensor | None
    """[M], for hash routing."""
    padding: Tensor | None
    """[M] bool, or a number of rows; see `moegate.route`."""
    prepared: Prepared
    out: Routing | None
    """Tensors to be filled; None: new ones."""
    stream: int
    """The current stream of the current device, as CUDA's handle; 0 where no kernel of ours runs."""


Half = Literal["both", "gemm", "selection"]
"""What of a route is computed."""
Prepared = dict[Any, object]
"""By GEMM, what it made of one gate's weight; of those that made anything."""


class PartialSums(NamedTuple):
    """What a split-K GEMM leaves to the selection behind it: num_splits * num_terms summands of each logit."""

    sums: Tensor
    """[num_splits, M, columns] float32; columns is num_terms * R, or more."""
    norm_factors: Tensor | None
    """[M] float32, what the sums are multiplied by, with an input norm."""


Logits = Tensor | PartialSums


class KernelSource(NamedTuple):
    """One kernel as a number of tokens has it, for people: `moegate explain --source`."""

    kernel: str
    """Its name in the text; a library's name, where the kernel is none of ours."""
    header: str
    """The file of cuda/kernels that the text instantiates; "" for a library's."""
    plan: str
    """Blocks, threads, and who computes what."""
    text: str
    """What NVRTC gets; "" for a library's."""
    shared_bytes: int
    """The dynamic shared memory of a block."""


class BoundGemm(Protocol):
    """A GEMM for one problem on one device."""

    num_terms: int
    """Of a weight in its `PartialSums`; 0: it always makes the logits themselves."""
    holds_dependents_to: int
    """Up to so many tokens, what is launched behind the selection is to start only when this GEMM has ended."""

    def __call__(self, call: Call) -> Logits:
        """The logits [M, R] of M > 0 tokens, or what a selection makes them of."""
        ...

    def logits(self, call: Call) -> Tensor:
        """The logits [M, R] themselves."""
        ...


class BoundSelection(Protocol):
    """A selection for one problem on one device."""

    def __call__(self, call: Call, logits: Logits) -> Routing:
        """The routing of M > 0 tokens, with its logits where they exist as a tensor."""
        ...


class Way(ABC):
    """What is common to both halves. Reasons are sentences for users; None stands for none."""

    @abstractmethod
    def name_of(self, problem: Problem) -> str:
        """What users call it."""

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """Why it cannot run for so many tokens."""
        return None

    def breaks(self, problem: Problem, num_tokens: int) -> str | None:
        """The promise of docs/contract.md that it would not keep."""
        return None

    def try_out(self, problem: Problem, device: torch.device) -> str | None:
        """Why it cannot run on a device that is here, found out by running it once."""
        return None

    def sources(self, problem: Problem, chip: Chip, num_tokens: int, num_terms: int) -> list[KernelSource]:
        """The kernels for so many tokens; `num_terms` are those of the partial sums between the halves (0: logits)."""
        return []


class Gemm(Way):
    """A way to make logits of hidden states."""

    @abstractmethod
    def bind(self, problem: Problem, device: torch.device) -> BoundGemm:
        """Finds and compiles what runs."""

    def prepare(self, problem: Problem, weight: Tensor) -> object | None:
        """What pays to be made once of a frozen weight, for `Call.prepared`."""
        return None

    def num_terms(self, problem: Problem, chip: Chip, num_tokens: int) -> int:
        """Of a weight in the `PartialSums` that it makes of so many tokens; 0: it makes the logits themselves."""
        return 0

    def falls_back(self, problem: Problem) -> str | None:
        """Why PyTorch's operations make the logits in its place."""
        return None


class Selection(Way):
    """A way to choose experts and weights by logits."""

    @abstractmethod
    def bind(self, problem: Problem, device: torch.device, gemm: BoundGemm | None) -> BoundSelection:
        """Finds and compiles what runs, behind a GEMM or (None) on logits that are given."""
