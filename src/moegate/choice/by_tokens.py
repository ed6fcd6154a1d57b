"""What runs for each number of tokens: the spans of a plan, with something bound for each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from moegate.choice.candidates import Candidate
from moegate.choice.plan import Span
from moegate.halves import Call, Logits
from moegate.problem import Problem
from moegate.routing import Routing, outputs_of

Bound = TypeVar("Bound")


class ByTokens(NamedTuple, Generic[Bound]):
    """What runs, by number of tokens: `bound[bisect_left(ends, num_tokens)]`."""

    ends: list[int]
    """The last number of tokens of each span, less that of the last one, which has none."""
    bound: list[Bound | None]
    """By span; None: a forced backend cannot run there."""


def by_tokens(spans: Iterable[Span], bind: Callable[[Candidate], Bound], nothing: Bound | None) -> ByTokens[Bound]:
    """Binds each candidate once; `nothing` runs where there is no token (None: what runs for one token)."""
    spans = list(spans)
    made = {candidate: bind(candidate) for candidate in dict.fromkeys(span.candidate for span in spans)}
    found: ByTokens[Bound] = ByTokens([], [])
    if nothing is not None:
        found.ends.append(0)
        found.bound.append(nothing)
    following = 1
    for first, last, candidate in spans:
        if first > following:
            found.ends.append(first - 1)
            found.bound.append(None)
        found.bound.append(made[candidate])
        if last is not None:
            found.ends.append(last)
            following = last + 1
    if len(found.bound) == len(found.ends):  # no candidate for any further number of tokens
        found.bound.append(None)
    return found


class NoTokens:
    """Both halves where there is nothing to compute: only the tensors are made."""

    num_terms = holds_dependents_to = 0

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self._spec, self._device = problem.spec, device

    def logits(self, call: Call) -> Tensor:
        """No logits [0, R]."""
        made = self._made(call).logits
        assert made is not None
        return made

    def select(self, call: Call, logits: Logits) -> Routing:
        """The routing of no token."""
        assert isinstance(logits, Tensor)
        return self._made(call)._replace(logits=logits)

    __call__ = logits

    def _made(self, call: Call) -> Routing:
        if call.out is not None and call.out.logits is not None:
            return call.out
        made = (
            torch.empty(each.shape(0), dtype=each.dtype, device=self._device) if each.is_there else None
            for each in outputs_of(self._spec)
        )
        return Routing(*made).into(call.out)  # type: ignore[arg-type]
