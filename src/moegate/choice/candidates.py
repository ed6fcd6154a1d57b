"""All ways to route that a plan can choose among: pairs of a GEMM and a selection."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moegate.cuda.device import Chip
from moegate.gemm.cublas import CUBLAS as CUBLAS_GEMM
from moegate.gemm.dot_gemm import DOT_GEMM as DOT_GEMM_KERNEL
from moegate.gemm.flashinfer_mm import FLASHINFER_MM
from moegate.gemm.flashinfer_mm import FLASHINFER_TINYGEMM as TINYGEMM
from moegate.gemm.router_gemm import ROUTER_GEMM as ROUTER_GEMM_KERNEL
from moegate.gemm.torch_mm import TORCH_MM
from moegate.halves import BoundGemm, BoundSelection, Gemm, KernelSource, Selection
from moegate.problem import Problem
from moegate.selection.flashinfer_top_k import FLASHINFER_TOP_K as FUSED_TOP_K
from moegate.selection.select_kernel import SELECT
from moegate.selection.torch_ops import TORCH_OPS


class OurSelection(Selection):
    """Behind FlashInfer's GEMMs: our kernel where NVRTC can compile it, else PyTorch's operations."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return self._found(problem).name_of(problem)

    def bind(self, problem: Problem, device: torch.device, gemm: BoundGemm | None) -> BoundSelection:
        """One of the two."""
        return self._found(problem).bind(problem, device, gemm)

    def _found(self, problem: Problem) -> Selection:
        return SELECT if SELECT.unsupported(problem, 1) is None else TORCH_OPS


OUR_SELECTION = OurSelection()


@dataclass(frozen=True)
class Candidate:
    """One way to route: a GEMM, and the selection behind it."""

    backend: str
    """What users force."""
    gemm: Gemm
    selection: Selection
    label: str = "{gemm}+{selection}"
    """Its name in plans and cost tables."""

    def kernel_of(self, problem: Problem) -> str:
        """What runs, by name."""
        return self.label.format(gemm=self.gemm.name_of(problem), selection=self.selection.name_of(problem))

    def key(self, problem: Problem) -> str:
        """Its name in cost tables."""
        return f"{self.backend}:{self.kernel_of(problem)}"

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """None, or why it cannot run for so many tokens."""
        return self.gemm.unsupported(problem, num_tokens) or self.selection.unsupported(problem, num_tokens)

    def breaks(self, problem: Problem, num_tokens: int) -> str | None:
        """None, or the promise of docs/contract.md that would not be kept."""
        broken = [way.breaks(problem, num_tokens) for way in (self.gemm, self.selection)]
        return ", and ".join(reason for reason in broken if reason is not None) or None

    def sources(self, problem: Problem, chip: Chip, num_tokens: int) -> list[KernelSource]:
        """The kernels for so many tokens, in the order in which they run; none of PyTorch's and of FlashInfer's."""
        num_terms = self.gemm.num_terms(problem, chip, num_tokens)
        gemm = self.gemm.sources(problem, chip, num_tokens, num_terms)
        return gemm + self.selection.sources(problem, chip, num_tokens, num_terms)

    def try_out(self, problem: Problem, device: torch.device) -> str | None:
        """None, or why it cannot run on a device that is here, found out by running it once."""
        return self.gemm.try_out(problem, device) or self.selection.try_out(problem, device)


ROUTER_GEMM = Candidate("cuda", ROUTER_GEMM_KERNEL, SELECT)
CUBLAS = Candidate("cuda", CUBLAS_GEMM, SELECT)
DOT_GEMM = Candidate("cuda", DOT_GEMM_KERNEL, SELECT)
TORCH = Candidate("torch", TORCH_MM, TORCH_OPS)
FLASHINFER_GEMM = Candidate("flashinfer", FLASHINFER_MM, OUR_SELECTION, "{gemm}")
FLASHINFER_PAIR = Candidate("flashinfer", FLASHINFER_MM, FUSED_TOP_K)
FLASHINFER_TOP_K = Candidate("flashinfer", TORCH_MM, FUSED_TOP_K, "cublas+{selection}")
FLASHINFER_TINYGEMM = Candidate("flashinfer", TINYGEMM, OUR_SELECTION, "{gemm}")

CANDIDATES = (
    ROUTER_GEMM,
    CUBLAS,
    DOT_GEMM,
    TORCH,
    FLASHINFER_GEMM,
    FLASHINFER_PAIR,
    FLASHINFER_TOP_K,
    FLASHINFER_TINYGEMM,
)
"""In the order in which they are taken where nothing is known of their times."""
BACKENDS = ("cuda", "torch")
"""Those that keep docs/contract.md, best first."""
