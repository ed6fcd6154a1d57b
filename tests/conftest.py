"""What all tests share."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# The same examples in every run, so that a red run is red again; `--hypothesis-profile explore` draws new ones.
settings.register_profile("repeatable", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile("repeatable")


def pytest_configure() -> None:
    """One thread for each worker of pytest-xdist: more would wait for each other."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves the tests marked `gpu` out where there is no GPU; the run's summary counts them, with the reason."""
    if not torch.cuda.is_available():
        left_out = pytest.mark.skip(reason="no CUDA device on this machine")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(left_out)
