"""Which kernels run for a number of tokens, on what evidence, and why no others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from moegate.choice import costs
from moegate.choice.candidates import CANDIDATES, CUBLAS, ROUTER_GEMM, Candidate
from moegate.choice.plan import Plan
from moegate.choice.policies import gemm_tokens
from moegate.choice.tables import table_for


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


def explain_half(plan: Plan, num_tokens: int, half: Literal["gemm", "selection"]) -> Explanation:
    """The same of one half of a plan: each way once, without times, which are those of whole routes.

    Raises:
        TypeError: Not an int.
        ValueError: The backend is forced, and cannot; or a negative number.
    """
    whole, problem = explain(plan, num_tokens), plan.problem
    word = "GEMM" if half == "gemm" else half
    names = {(each.backend, each.kernel_of(problem)): getattr(each, half).name_of(problem) for each in CANDIDATES}
    kernel = names[whole.backend, whole.kernel]
    rejected: dict[str, Rejected] = {}
    for each in whole.rejected:
        name = names[each.backend, each.kernel]
        if name != kernel:
            rejected.setdefault(name, replace(each, kernel=name, expected_us=None, evidence=None))
    return replace(
        whole,
        kernel=kernel,
        expected_us=None,
        evidence=f"nothing is measured of a {word} alone; the times of whole routes choose",
        rejected=tuple(rejected.values()),
    )


def explain(plan: Plan, num_tokens: int) -> Explanation:
    """Which kernels run, their expected time, and every other candidate with its time or the reason.

    Raises:
        TypeError: Not an int.
        ValueError: The backend is forced, and cannot; or a negative number.
    """
    if not isinstance(num_tokens, int) or isinstance(num_tokens, bool):
        raise TypeError(f"num_tokens: got {type(num_tokens).__name__}; allowed: an int")
    if num_tokens < 0:
        raise ValueError(f"num_tokens: got {num_tokens}; allowed: 0 or more")
    problem, choice = plan.problem, plan.choice(num_tokens)
    chosen = choice.candidate
    cost = costs.expected(problem, chosen, num_tokens)
    told = None if cost is None else costs.at_least_floor(problem, cost, num_tokens)
    others = [candidate for candidate in CANDIDATES if candidate is not chosen]
    return Explanation(
        num_tokens,
        chosen.backend,
        chosen.kernel_of(problem),
        choice.why,
        None if told is None else told.us,
        "nothing measured says anything about it" if told is None else told.evidence,
        tuple(_rejected(plan, candidate, num_tokens, cost) for candidate in others),
        (*_notes(plan, chosen, choice.passed_over, cost), *table_for(problem.machine).problems),
    )


def _notes(plan: Plan, chosen: Candidate, passed_over: str | None, cost: costs.Cost | None) -> list[str]:
    problem = plan.problem
    notes = [] if passed_over is None else [passed_over]
    falls_back = chosen.gemm.falls_back(problem)
    if falls_back is not None:
        notes.append(f"{falls_back}: PyTorch's operations make the logits")
    differs = chosen.backend == "cuda" and not problem.frozen
    if cost is not None and differs and not costs.tells_of_not_frozen(problem.machine, chosen.key(problem)):
        notes.append("the times are a frozen gate's; this one is not frozen")
    return notes


def _rejected(plan: Plan, candidate: Candidate, num_tokens: int, chosen: costs.Cost | None) -> Rejected:
    problem, cost = plan.problem, None
    reason = candidate.unsupported(problem, num_tokens)
    if reason is None:
        cost = costs.expected(problem, candidate, num_tokens)
        reason = _why_not(plan, candidate, num_tokens, cost, chosen)
    times = (None, None) if cost is None else costs.at_least_floor(problem, cost, num_tokens)
    return Rejected(candidate.backend, candidate.kernel_of(problem), reason, *times)


def _why_not(
    plan: Plan, candidate: Candidate, num_tokens: int, cost: costs.Cost | None, chosen: costs.Cost | None
) -> str:
    """Why a candidate that could run does not."""
    broken = candidate.breaks(plan.problem, num_tokens)
    if plan.policy == "sglang":
        return "the rule names another kernel"
    if plan.backend not in (None, candidate.backend):
        return f"backend = {plan.backend!r}"
    if broken is not None and plan.choice(num_tokens).candidate.breaks(plan.problem, num_tokens) is None:
        return f"breaks a promise: {broken}"
    if cost is None or chosen is None:
        return "no time is known that would be less"
    if cost.us >= chosen.us:
        return "slower"
    if candidate in (ROUTER_GEMM, CUBLAS):  # interpolated times may cross twice
        return f"router_gemm runs up to one number of tokens, here {gemm_tokens(plan.problem)}, and cuBLAS beyond"
    return "slower at the most tokens that were measured"
