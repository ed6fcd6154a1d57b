"""Tests beside an installed vLLM, run with its Python: `python -m pytest tests/engines/vllm`."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel

os.environ["VLLM_NO_USAGE_STATS"] = "1"
for _name in ("MOEGATE", "MOEGATE_LOGITS", "VLLM_PLUGINS"):
    os.environ.pop(_name, None)


@pytest.fixture(scope="session")
def vllm_config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmConfig]:
    """A world of one process, in which vLLM's layers can be made."""
    config = VllmConfig()
    address = f"file://{tmp_path_factory.mktemp('world') / 'store'}"
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, address, 0, backend="gloo")
        initialize_model_parallel()
        yield config
