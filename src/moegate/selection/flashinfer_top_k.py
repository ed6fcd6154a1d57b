"""FlashInfer's fused_topk_deepseek: sigmoid scores with a correction bias, in groups or not."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.flashinfer import functions, limits
from moegate.halves import BoundGemm, Call, Logits, Selection
from moegate.problem import Problem
from moegate.routing import Routing
from moegate.selection.padding import with_padding


class FlashInferTopK(Selection):
    """The routers of DeepSeek-V3's kind, ties and NaN apart."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return limits.TOP_K.name

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """Why it cannot run."""
        return limits.top_k_refuses(problem.spec) or functions.unsupported(limits.TOP_K, problem.machine)

    def breaks(self, problem: Problem, num_tokens: int) -> str | None:
        """The promise that it does not keep."""
        return "FlashInfer leaves the order of equal keys and NaN undefined"

    def try_out(self, problem: Problem, device: torch.device) -> str | None:
        """Why it cannot run on the device."""
        spec = problem.spec

        def run_once() -> tuple[Tensor, Tensor]:
            top_k = functions.bound_top_k(limits.TOP_K, device, spec, pdl=True)
            return top_k(
                torch.zeros((1, spec.num_gate_rows), device=device), torch.zeros(spec.num_gate_rows, device=device)
            )

        return functions.try_out(limits.TOP_K, device, run_once)

    def bind(self, problem: Problem, device: torch.device, gemm: BoundGemm | None) -> BoundFlashInferTopK:
        """The function, found."""
        assert gemm is None or gemm.num_terms == 0
        return BoundFlashInferTopK(problem, device)


FLASHINFER_TOP_K = FlashInferTopK()


class BoundFlashInferTopK:
    """The function, for one problem."""

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._top_k = functions.bound_top_k(limits.TOP_K, device, problem.spec, pdl=problem.pdl)

    def __call__(self, call: Call, logits: Logits) -> Routing:
        """The routing, with its logits."""
        assert isinstance(logits, Tensor)
        # FlashInfer takes no tensor that needs a gradient.
        ids, weights = self._top_k(logits, call.tensors.detach().e_score_correction_bias)
        return with_padding(Routing(ids, weights, logits), call.padding).into(call.out)
