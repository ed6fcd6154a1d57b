"""What moegate took over in this process, in one line of the log."""

from __future__ import annotations

import logging

from moegate.integrations.takeover import Takeover

_log = logging.getLogger("moegate")


class Report:
    """Collects the decisions on the layers, and tells them when a forward pass has met all layers it meets."""

    def __init__(self) -> None:
        self.takeover = Takeover()
        self._told = str(self.takeover)

    def note(self, layer: str, reason: str | None) -> None:
        """Notes a layer that moegate routes, or the reason why SGLang goes on to."""
        taken, left = self.takeover.taken, self.takeover.left
        if reason is not None:
            left[layer] = reason
        elif layer not in taken:
            taken.append(layer)

    def tell(self) -> None:
        """Logs the line, if it is news."""
        line = str(self.takeover)
        if line != self._told:
            self._told = line
            _log.info("%s", line)


REPORT = Report()
"""Of this process."""
