"""What an integration takes over in a model, and what it leaves to the engine."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


class LeftToEngineError(Exception):
    """A router that is not provably the same as one of moegate's; the text is the reason, short enough for a log."""


@dataclass
class Takeover:
    """The MoE layers of a model, by who routes them.

    `str()` is one line: "moegate routes 55 of 58 MoE layers; 3 left: quantised gate".
    """

    taken: list[str] = field(default_factory=list)
    """The names of the layers that moegate routes."""
    left: dict[str, str] = field(default_factory=dict)
    """The names of the layers that the engine goes on to route, each with the reason."""

    def __str__(self) -> str:
        line = f"moegate routes {len(self.taken)} of {len(self.taken) + len(self.left)} MoE layers"
        reasons = Counter(self.left.values()).most_common()
        if not reasons:
            return line
        named = reasons[0][0] if len(reasons) == 1 else ", ".join(f"{reason} ({count})" for reason, count in reasons)
        return f"{line}; {len(self.left)} left: {named}"
