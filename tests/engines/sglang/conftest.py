"""The plugin in this process, loaded as SGLang loads it."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # read when SGLang is imported

import pytest
import sglang_stubs
import torch._dynamo.config

sglang_stubs.install()
torch._dynamo.config.disable = True  # SGLang's own selections run eagerly here: compiling one takes half a minute


@pytest.fixture(scope="session", autouse=True)
def plugin() -> None:
    """SGLang with moegate switched on."""
    from sglang.srt.plugins import load_plugins

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEGATE", "1")
        load_plugins()


@pytest.fixture(autouse=True)
def served() -> Iterator[None]:
    """The context that SGLang computes in."""
    from sglang.srt.runtime_context import get_context

    with get_context().override_server_args(), torch.inference_mode():
        yield
