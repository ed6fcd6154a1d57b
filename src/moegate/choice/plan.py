"""A plan: for one problem, which candidate runs at every number of tokens."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from moegate.choice.candidates import CANDIDATES, ROUTER_GEMM, Candidate
from moegate.choice.policies import GEMM_STEPS, POLICIES, Choice, forced, measured, sglang
from moegate.contract.limits import MAX_DECODE_TOKENS
from moegate.problem import Problem
from moegate.warn import warn_once

_log = logging.getLogger("moegate")
# Among these is every number of tokens at which a kernel or a rule begins or ends. Beyond these, only costs decide.
_PROBES = (
    *range(1, MAX_DECODE_TOKENS + 2),
    *(step + more for step in GEMM_STEPS for more in (0, 1)),
    *(1 << power for power in range(11, 21)),
)
BACKEND_NAMES = tuple(dict.fromkeys(candidate.backend for candidate in CANDIDATES))


class Span(NamedTuple):
    """Numbers of tokens at which one candidate runs."""

    first: int
    last: int | None
    """None: every further one."""
    candidate: Candidate


def check_names(policy: object, backend: object) -> None:
    """Raises a ValueError for an unknown policy or backend."""
    if policy not in POLICIES:
        raise ValueError(f"policy: got {policy!r}; allowed: {', '.join(map(repr, POLICIES))}")
    if backend is not None and backend not in BACKEND_NAMES:
        raise ValueError(f"backend: got {backend!r}; allowed: None, {', '.join(map(repr, BACKEND_NAMES))}")
    if backend is not None and policy != "measured":
        raise ValueError(f"policy: got {policy!r} with backend = {backend!r}; allowed: one of the two")


@dataclass(frozen=True)
class Plan:
    """The choice for one problem at every number of tokens."""

    problem: Problem
    policy: str = "measured"
    backend: str | None = None
    """Only this backend, whatever the policy; None: the policy chooses."""

    def __post_init__(self) -> None:
        check_names(self.policy, self.backend)
        self.choice(1)  # a forced backend that cannot run says so now

    def choice(self, num_tokens: int, problem: Problem | None = None) -> Choice:
        """What runs for so many tokens, and why; of another problem by the same policy, if one is given.

        Raises:
            ValueError: The backend is forced, and cannot.
        """
        return self._policy(problem or self.problem, num_tokens)

    @property
    def _policy(self) -> Callable[[Problem, int], Choice]:
        if self.backend is not None:
            return forced(self.backend)
        return {"measured": measured, "sglang": sglang}[self.policy]

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """All that run at some number of tokens, in the order of these numbers."""
        return tuple(dict.fromkeys(span.candidate for span in self.spans))

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The plan from one token on, in the order of the numbers; with gaps where a forced backend cannot run."""
        return self.spans_for(self.problem)

    def spans_for(self, problem: Problem) -> tuple[Span, ...]:
        """The spans of another problem, by the same policy."""
        starts = [1]
        for low, high in itertools.pairwise(_PROBES):
            starts += self._switches(problem, low, high)
        ends = [start - 1 for start in starts[1:]]
        spans = zip(starts, [*ends, None], [self._candidate(problem, start) for start in starts], strict=True)
        return tuple(Span(first, last, candidate) for first, last, candidate in spans if candidate is not None)

    def _switches(self, problem: Problem, low: int, high: int) -> list[int]:
        """The numbers in (low, high] at which another candidate begins, found by bisection."""
        if self._candidate(problem, low) is self._candidate(problem, high):
            return []
        if high - low == 1:
            return [high]
        middle = (low + high) // 2
        return self._switches(problem, low, middle) + self._switches(problem, middle, high)

    def _candidate(self, problem: Problem, num_tokens: int) -> Candidate | None:
        """What runs; None: a forced backend cannot, so that the call that has so many tokens raises."""
        try:
            return self.choice(num_tokens, problem).candidate
        except ValueError:
            assert self.backend is not None
            return None


def log(plan: Plan) -> None:
    """One line at INFO."""
    if _log.isEnabledFor(logging.INFO):
        spec, machine = plan.problem.spec, plan.problem.machine
        size = f"{spec.hidden_size} x {spec.num_gate_rows}, top {spec.top_k}"
        _log.info("gate %s on %s: %s (%s)", size, machine.name, _in_words(plan), plan.backend or plan.policy)


def _in_words(plan: Plan) -> str:
    parts = []
    for first, last, candidate in plan.spans:
        tokens = f"M {first}" if first == last else f"M {first} and more" if last is None else f"M {first} to {last}"
        parts.append(f"{tokens} {candidate.backend} {candidate.kernel_of(plan.problem)}")
    return ", ".join(parts)


def warn_of_slow_paths(plan: Plan) -> None:
    """Warns where a slow candidate runs in the place of a fast one, with the remedy."""
    problem, machine = plan.problem, plan.problem.machine
    if plan.backend is not None or machine.capability is None:
        return
    choice = plan.choice(1)
    reason = ROUTER_GEMM.unsupported(problem, 1)
    if plan.policy == "measured" and choice.candidate.backend == "torch":
        warn_once(
            f"the cuda backend cannot run on {machine.name}: {reason}. PyTorch's operations take its place, which "
            "are many times slower"
        )
    if choice.passed_over is not None:
        warn_once(f"{choice.passed_over}. The next row of the rule runs: {choice.candidate.kernel_of(problem)}")
