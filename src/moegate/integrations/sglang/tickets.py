"""How a routing travels from a gate to its selection: on the tensor of the logits that the same call computed.

A ticket is an attribute of one tensor object. A copy, a slice, a cast, a collective and a compiled graph make other
objects, which have none. The logits are no inference tensor, so that PyTorch counts writes in place, also through
views. So a ticket that is there, with the version it was given for, belongs to the logits as the gate wrote them.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from moegate import Routing

_ATTRIBUTE = "_moegate_ticket"


class Gates(Protocol):
    """A gate that can route for a selection."""

    def serve(self, selection: Any) -> None:
        """From the next call on, routes for the selection, which has just been given logits of this gate."""


class Ticket(NamedTuple):
    """What the logits of one call bring along."""

    gate: Gates
    version: int
    selection: object = None
    """What the routing was made for."""
    routing: Routing | None = None


def attach(ticket: Ticket, logits: Tensor) -> None:
    """Puts the ticket on the logits that its gate has just computed."""
    setattr(logits, _ATTRIBUTE, ticket)


def take(logits: Tensor) -> Ticket | None:
    """Takes the ticket off the logits; None: they have none, or were written to.

    A ticket is taken once, since SGLang writes to the ids that it is given.
    """
    ticket: Ticket | None = logits.__dict__.pop(_ATTRIBUTE, None)
    return ticket if ticket is not None and logits._version == ticket.version else None
