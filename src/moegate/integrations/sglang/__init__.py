"""moegate as a plugin of SGLang: `register` is the entry point of the group `sglang.srt.plugins`."""

from __future__ import annotations

import logging

from moegate.integrations.engines import SGLANG

_log = logging.getLogger("moegate")


def register() -> None:
    """Hooks moegate into SGLang, if the user asked for it and SGLang is a tested one.

    SGLang calls this once in each of its processes, before it builds a model. Never raises: SGLang would go on without
    the hooks, and so the reason is logged here.
    """
    if not SGLANG.is_asked_for():
        return
    try:
        reason = SGLANG.why_not()
        if reason is None:
            # Only now: the hooks import SGLang's model code.
            from moegate.integrations.sglang import hooks

            reason = hooks.add()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        _log.warning("moegate leaves all routers to SGLang: %s", reason)
