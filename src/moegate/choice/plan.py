"""A plan: for one problem, which kernels run at every number of tokens, and why."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch

from moegate.backends import BACKENDS
from moegate.backends.cuda.tiling import MAX_DECODE_TOKENS
from moegate.choice import costs
from moegate.choice.candidates import CANDIDATES, CUBLAS, ROUTER_GEMM, Candidate, plain_product
from moegate.choice.facts import Facts
from moegate.choice.policies import GEMM_STEPS, POLICIES, Choice, forced, gemm_tokens, measured, sglang
from moegate.choice.tables import table_for
from moegate.warn import warn_once

_log = logging.getLogger("moegate")
# Every number of tokens that a kernel or a rule distinguishes is among these; beyond, only costs do.
_PROBES = (
    *range(MAX_DECODE_TOKENS + 2),
    *(step + more for step in GEMM_STEPS for more in (0, 1)),
    *(1 << power for power in range(11, 21)),
)
BACKEND_NAMES = (*(backend.name for backend in BACKENDS), "flashinfer")


@dataclass(frozen=True)
class Rejected:
    """A candidate that does not run."""

    backend: str
    kernel: str
    reason: str
    expected_us: float | None
    evidence: str | None


@dataclass(frozen=True)
class Explanation:
    """Which kernels run for a number of tokens, and why."""

    tokens: int
    backend: str
    kernel: str
    why: str
    expected_us: float | None
    """Microseconds in a CUDA graph behind a predecessor; None: no measurement says anything about it. A time that was
    inferred from another GPU is no less than this one takes to read the weight and the hidden states."""
    evidence: str
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]
    """What else is to be known: a rule's own choice that cannot run, a cost table that was ignored."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """For people: a line for what runs, and one for each other candidate and note."""

        def time(us: float | None) -> str:
            return "no known time" if us is None else f"{us:.2f} us"

        runs = f"{self.backend} {self.kernel}, {time(self.expected_us)}"
        lines = [f"{self.tokens} token{'s' * (self.tokens != 1)}: {runs} ({self.evidence}); {self.why}"]
        lines += [
            f"  not {each.backend} {each.kernel}, {time(each.expected_us)}: {each.reason}" for each in self.rejected
        ]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class Plan:
    """The choice for one problem at every number of tokens."""

    facts: Facts
    policy: str = "measured"
    backend: str | None = None
    """Only this backend, whatever the policy; None: the policy chooses."""

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy: got {self.policy!r}; allowed: {', '.join(map(repr, POLICIES))}")
        if self.backend is not None and self.backend not in BACKEND_NAMES:
            allowed = ", ".join(map(repr, BACKEND_NAMES))
            raise ValueError(f"backend: got {self.backend!r}; allowed: None, {allowed}")
        if self.backend is not None and self.policy != "measured":
            raise ValueError(f"policy: got {self.policy!r} with backend = {self.backend!r}; allowed: one of the two")
        self.choice(1)  # a forced backend that cannot run says so now

    def choice(self, num_tokens: int, hidden: torch.dtype | None = None) -> Choice:
        """What runs for so many tokens, with hidden states of another dtype than the facts' if one is given.

        Raises:
            ValueError: The backend is forced, and cannot.
        """
        facts = self.facts if hidden in (None, self.facts.hidden) else replace(self.facts, hidden=hidden)
        return self._policy(facts, num_tokens)

    @property
    def _policy(self) -> Callable[[Facts, int], Choice]:
        if self.backend is not None:
            return forced(self.backend)
        return {"measured": measured, "sglang": sglang}[self.policy]

    @cached_property
    def candidates(self) -> tuple[Candidate, ...]:
        """All that run at some number of tokens, in the order of these numbers."""
        return tuple(dict.fromkeys(candidate for _, candidate in self._probed))

    @cached_property
    def _probed(self) -> list[tuple[int, Candidate]]:
        """What runs at each number of `_PROBES`; none where a forced backend cannot: the call that has it raises."""
        found = []
        for num_tokens in _PROBES:
            try:
                found.append((num_tokens, self.choice(num_tokens).candidate))
            except ValueError:
                assert self.backend is not None
        return found

    def explain(self, num_tokens: int) -> Explanation:
        """Which kernels run, their expected time, and every other candidate with its time or the reason.

        Raises:
            TypeError: Not an int.
            ValueError: The backend is forced, and cannot; or a negative number.
        """
        if not isinstance(num_tokens, int) or isinstance(num_tokens, bool):
            raise TypeError(f"num_tokens: got {type(num_tokens).__name__}; allowed: an int")
        if num_tokens < 0:
            raise ValueError(f"num_tokens: got {num_tokens}; allowed: 0 or more")
        choice = self.choice(num_tokens)
        key = choice.candidate.key(self.facts)
        cost = costs.expected(self.facts, key, num_tokens)
        notes = [] if choice.passed_over is None else [choice.passed_over]
        plain = plain_product(self.facts) if choice.candidate is CUBLAS else None
        if plain is not None:
            notes.append(f"{plain}: PyTorch's operations make the logits")
        differs = choice.candidate.backend == "cuda" and not self.facts.frozen
        if cost is not None and differs and not costs.tells_of_not_frozen(self.facts.machine, key):
            notes.append("the times are a frozen gate's; this one is not frozen")
        told = None if cost is None else costs.at_least_floor(self.facts, cost, num_tokens)
        others = [candidate for candidate in CANDIDATES if candidate is not choice.candidate]
        return Explanation(
            num_tokens,
            choice.candidate.backend,
            choice.candidate.kernel_of(self.facts),
            choice.why,
            None if told is None else told.us,
            "nothing measured says anything about it" if told is None else told.evidence,
            tuple(self._rejected(candidate, num_tokens, cost) for candidate in others),
            (*notes, *table_for(self.facts.machine).problems),
        )

    def _rejected(self, candidate: Candidate, num_tokens: int, chosen: costs.Cost | None) -> Rejected:
        facts, cost = self.facts, None
        reason = candidate.supports(facts, num_tokens)
        if reason is None:
            cost = costs.expected(facts, candidate.key(facts), num_tokens)
            broken = candidate.breaks(facts, num_tokens)
            if self.policy == "sglang":
                reason = "the rule says another"
            elif self.backend not in (None, candidate.backend):
                reason = f"backend = {self.backend!r}"
            elif broken is not None and self.backend is None:
                reason = f"breaks a promise: {broken}"
            elif cost is None or chosen is None:
                reason = "no time is known that would be less"
            elif cost.us >= chosen.us:
                reason = "slower"
            elif candidate in (ROUTER_GEMM, CUBLAS):  # interpolated times may cross twice
                reason = f"router_gemm runs up to one number of tokens, here {gemm_tokens(facts)}, and cuBLAS beyond"
            else:
                reason = "slower at the most tokens that were measured"
        times = (None, None) if cost is None else costs.at_least_floor(facts, cost, num_tokens)
        return Rejected(candidate.backend, candidate.kernel_of(facts), reason, *times)

    def spans(self) -> list[tuple[int, int | None, Candidate]]:
        """(first M, last M or None for every further one, what runs), as far as the probes tell."""
        found: list[tuple[int, int | None, Candidate]] = []
        for num_tokens, candidate in self._probed:
            if num_tokens == 0:
                continue
            if found and found[-1][2] is candidate:
                found[-1] = (found[-1][0], num_tokens, candidate)
            else:
                found.append((num_tokens, num_tokens, candidate))
        if found and found[-1][1] == _PROBES[-1]:
            found[-1] = (found[-1][0], None, found[-1][2])
        return found


def log(plan: Plan) -> None:
    """One line at INFO."""
    if _log.isEnabledFor(logging.INFO):
        spec, machine = plan.facts.spec, plan.facts.machine
        size = f"{spec.hidden_size} x {spec.num_gate_rows}, top {spec.top_k}"
        _log.info("gate %s on %s: %s (%s)", size, machine.name, _in_words(plan), plan.backend or plan.policy)


def warn_of_slow_paths(plan: Plan) -> None:
    """Warns where something slow takes the place of what was to run, with the way out of it."""
    facts, machine = plan.facts, plan.facts.machine
    if plan.backend is not None or machine.capability is None:
        return
    choice = plan.choice(1)
    reason = ROUTER_GEMM.supports(facts, 1)
    if plan.policy == "measured" and choice.candidate.backend == "torch":
        warn_once(
            f"the cuda backend cannot run on {machine.name}: {reason}. PyTorch's operations take its place, which "
            "are many times slower"
        )
    if choice.passed_over is not None:
        warn_once(f"{choice.passed_over}. The next row of the rule runs: {choice.candidate.kernel_of(facts)}")


def _in_words(plan: Plan) -> str:
    parts = []
    for first, last, candidate in plan.spans():
        tokens = f"M {first}" if first == last else f"M {first} and more" if last is None else f"M {first} to {last}"
        parts.append(f"{tokens} {candidate.backend} {candidate.kernel_of(plan.facts)}")
    return ", ".join(parts)
