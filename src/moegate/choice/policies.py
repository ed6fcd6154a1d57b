"""How a plan chooses: by measured cost, by SGLang's rule, or as it was told."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch

from moegate.choice import costs
from moegate.choice.candidates import CANDIDATES, CUBLAS, FLASHINFER_GEMM, ROUTER_GEMM, TORCH, Candidate
from moegate.contract.limits import MAX_DECODE_TOKENS
from moegate.gemm.router_gemm import promises_bits
from moegate.gemm.router_gemm_tiling import MAX_GEMM_TOKENS
from moegate.problem import Problem, short

POLICIES = ("measured", "sglang")
GEMM_STEPS = range(2 * MAX_DECODE_TOKENS, MAX_GEMM_TOKENS + 1, MAX_DECODE_TOKENS)
"""Possible crossover points: router_gemm runs up to one of these M (or up to `MAX_DECODE_TOKENS`), cuBLAS beyond."""
TIE = 1.02
"""Times as near as this may change places in the next run: then router_gemm runs, with the bits of fewer tokens."""


class Choice(NamedTuple):
    """What runs for a number of tokens."""

    candidate: Candidate
    why: str
    passed_over: str | None = None
    """What the rule would have run, and why it does not; None: the rule's own choice."""


def measured(problem: Problem, num_tokens: int) -> Choice:
    """The least expected time among the candidates that keep the contract."""
    able = [
        candidate
        for candidate in CANDIDATES
        if candidate.breaks(problem, num_tokens) is None and candidate.unsupported(problem, num_tokens) is None
    ]
    assert able, "PyTorch's operations run everything"
    if ROUTER_GEMM in able and promises_bits(problem, num_tokens):
        why = f"up to {MAX_DECODE_TOKENS} tokens router_gemm runs, so that a token's bits do not depend on M"
        return Choice(ROUTER_GEMM, why)
    candidate, why = _cheapest(able, problem, num_tokens)
    return Choice(candidate, f"{why} that keeps what a gate promises")


def sglang(problem: Problem, num_tokens: int) -> Choice:
    """SGLang's rule of April 2026 (DeepseekV2Gate.forward, sgl-project/sglang pull request 23285).

    Where it does not say what happens, docs/choice.md does: the next row.
    """
    row, why = sglang_row(problem, num_tokens)
    if row == 3:
        return Choice(TORCH, why)
    silent = _unsaid(problem, num_tokens)
    if silent is not None:
        return Choice(TORCH, f"row 3: rows 1 and 2 do not say what happens with {silent}")
    passed_over = None
    if row == 1:
        reason = FLASHINFER_GEMM.unsupported(problem, num_tokens)
        if reason is None:
            return Choice(FLASHINFER_GEMM, why)
        passed_over = f"row 1 asks for {FLASHINFER_GEMM.kernel_of(problem)}: {reason}"
        why = "row 2, the next: ours in the place of dsv3_router_gemm"
    reason = ROUTER_GEMM.unsupported(problem, num_tokens)
    if reason is None:
        return Choice(ROUTER_GEMM, why, passed_over)
    return Choice(TORCH, "row 3, the next: the plain linear", f"row 2 asks for router_gemm: {reason}")


def sglang_row(problem: Problem, num_tokens: int) -> tuple[int, str]:
    """Which row of the rule holds, to its letter, and what it says."""
    k, n, sm = problem.spec.hidden_size, problem.spec.num_gate_rows, problem.machine.sm
    if not (num_tokens <= 16 and k == 7168 and n in (256, 384) and sm >= 90):
        return 3, "row 3: the plain linear"
    if sm in (100, 103) and n == 256:
        return 1, "row 1: FlashInfer's router GEMM"
    return 2, "row 2: ours in the place of dsv3_router_gemm"


def _unsaid(problem: Problem, num_tokens: int) -> str | None:
    """What the rule does not ask about, though the kernels of its first two rows cannot take it."""
    if num_tokens == 0:
        return "M = 0"
    for name, dtype in (("hidden", problem.dtypes.hidden), ("weight", problem.dtypes.weight)):
        if dtype != torch.bfloat16:
            return f"{name} in {short(dtype)}"
    return None


def forced(backend: str) -> Callable[[Problem, int], Choice]:
    """The fastest of one backend: of its candidates that keep the contract, or of all, if none does."""

    def choose(problem: Problem, num_tokens: int) -> Choice:
        own = [candidate for candidate in CANDIDATES if candidate.backend == backend]
        able = [candidate for candidate in own if candidate.unsupported(problem, num_tokens) is None]
        if not able:
            kernels: dict[str | None, list[str]] = {}
            for candidate in own:
                kernels.setdefault(candidate.unsupported(problem, num_tokens), []).append(candidate.kernel_of(problem))
            reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in kernels.items())
            raise ValueError(
                f"backend: got {backend!r}, which cannot route {num_tokens} tokens here ({reasons}); "
                "allowed: None, or a backend that can"
            )
        keeping = [candidate for candidate in able if candidate.breaks(problem, num_tokens) is None]
        candidate, why = _cheapest(keeping or able, problem, num_tokens)
        return Choice(candidate, f"backend = {backend!r}: {why}")

    return choose


@cache
def gemm_tokens(problem: Problem) -> int:
    """Up to how many tokens router_gemm runs, and cuBLAS beyond: the crossover of two candidates of the cuda backend.

    At least `MAX_DECODE_TOKENS`; further by `GEMM_STEPS`, as far as router_gemm was measured and takes no more time.
    One number, since interpolated times may cross twice.
    """
    most = MAX_DECODE_TOKENS
    measured_to = costs.most_tokens(problem.machine, ROUTER_GEMM.key(problem))
    for num_tokens in GEMM_STEPS:
        if num_tokens > measured_to:
            break
        ours = costs.neighbours(problem, ROUTER_GEMM, num_tokens)
        others = {each.model: each.us for each in costs.neighbours(problem, CUBLAS, num_tokens)}
        # Of a shape that was not measured, both of its neighbours must say so: their mean went wrong more often.
        if not ours or any(each.us > TIE * others.get(each.model, 0.0) for each in ours):
            break
        most = num_tokens
    return most


def _cheapest(able: list[Candidate], problem: Problem, num_tokens: int) -> tuple[Candidate, str]:
    """The one with the least expected time, or the first unless a time is known for each of them; and which of the two.

    Beyond the tokens at which all were measured, their times there decide: lines drawn on from there cross by noise.
    """
    fastest = "the fastest"
    if ROUTER_GEMM in able and CUBLAS in able:
        most = gemm_tokens(problem)
        able.remove(CUBLAS if num_tokens <= most else ROUTER_GEMM)
        fastest = f"with router_gemm up to {most} tokens and cuBLAS beyond, the fastest"
    if len(able) == 1:
        return able[0], "the only one"
    measured_to = min(costs.most_tokens(problem.machine, candidate.key(problem)) for candidate in able)
    tokens = min(num_tokens, measured_to)
    known = [costs.expected(problem, candidate, tokens) for candidate in able]
    times = [cost.us for cost in known if cost is not None]
    if measured_to == 0 or len(times) < len(able):
        return able[0], "the first, since not all have a known time,"
    return able[times.index(min(times))], fastest
