"""Configs of a few keys, for tests of what reads them."""

from __future__ import annotations

from typing import Any

from moegate.catalog.model_types import model_types


def counting_experts(model_type: str, num_experts: int | None) -> dict[str, Any]:
    """The part of a config that states the number of experts."""
    first, *inner = model_types()[model_type].keys["num_experts"][0].split(".")
    return {first: {name: num_experts for name in inner} or num_experts} if inner != ["0"] else {first: [num_experts]}
