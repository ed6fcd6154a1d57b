"""FlashInfer's router GEMMs for four shapes, and its tinygemm for bfloat16 logits."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.flashinfer import functions, limits
from moegate.halves import Call, Gemm
from moegate.problem import Problem


class _FlashInferGemm(Gemm):
    def breaks(self, problem: Problem, num_tokens: int) -> str | None:
        """The promise that it does not keep."""
        return "FlashInfer does not promise a token the same bits at every M"

    def _function(self, problem: Problem) -> limits.Function:
        raise NotImplementedError

    def try_out(self, problem: Problem, device: torch.device) -> str | None:
        """Why it cannot run on the device."""
        spec = problem.spec

        def run_once() -> Tensor:
            weight, hidden = (
                torch.zeros((m, spec.hidden_size), device=device).bfloat16() for m in (spec.num_gate_rows, 1)
            )
            bias = torch.zeros(len(weight), dtype=torch.bfloat16, device=device) if spec.linear_bias else None
            gemm = functions.bound_gemm(self._function(problem), device, spec, pdl=True)
            return gemm(hidden, weight, bias)

        return functions.try_out(self._function(problem), device, run_once)

    def bind(self, problem: Problem, device: torch.device) -> BoundFlashInferGemm:
        """The function, found."""
        return BoundFlashInferGemm(self._function(problem), problem, device)


class FlashInferMm(_FlashInferGemm):
    """The router GEMM for the shape, with float32 logits."""

    def name_of(self, problem: Problem) -> str:
        """What users call it; the shape is in the name."""
        function = limits.GEMMS.get((problem.spec.hidden_size, problem.spec.num_gate_rows))
        return "mm_M1_16" if function is None else function.name

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """Why it cannot run for so many tokens."""
        dtypes = problem.dtypes
        reason = limits.gemm_refuses(problem.spec, dtypes.weight) or limits.dtype_refuses(dtypes.hidden)
        if reason is None and num_tokens > limits.MAX_TOKENS:
            reason = f"its router GEMMs take up to {limits.MAX_TOKENS} tokens"
        return reason or functions.unsupported(self._function(problem), problem.machine)

    def _function(self, problem: Problem) -> limits.Function:
        return limits.GEMMS[problem.spec.hidden_size, problem.spec.num_gate_rows]


class FlashInferTinygemm(_FlashInferGemm):
    """tinygemm_bf16, with bfloat16 logits."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return limits.TINYGEMM.name

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """Why it cannot run for so many tokens."""
        dtypes = problem.dtypes
        refused = limits.tinygemm_refuses(problem.spec, dtypes.weight, dtypes.bias)
        refused = refused or limits.dtype_refuses(dtypes.hidden)
        return refused or functions.unsupported(limits.TINYGEMM, problem.machine)

    def _function(self, problem: Problem) -> limits.Function:
        return limits.TINYGEMM


FLASHINFER_MM, FLASHINFER_TINYGEMM = FlashInferMm(), FlashInferTinygemm()


class BoundFlashInferGemm:
    """One of the functions, for one problem."""

    num_terms = holds_dependents_to = 0

    def __init__(self, function: limits.Function, problem: Problem, device: torch.device) -> None:
        self._gemm = functions.bound_gemm(function, device, problem.spec, pdl=problem.pdl)

    def __call__(self, call: Call) -> Tensor:
        """The logits [M, R]."""
        # FlashInfer takes no tensor that needs a gradient.
        hidden, weight, bias = call.hidden.detach(), call.weight.detach(), call.tensors.detach().bias
        return self._gemm(functions.dense(hidden, "hidden"), functions.dense(weight, "weight"), bias)

    logits = __call__
