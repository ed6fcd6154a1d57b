"""`moegate engines`: the table, and what would be routed of a checkpoint."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from command_line import refused, run
from tiny_models import tiny_model

from moegate.integrations import engines


@pytest.fixture
def only_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "transformers":
            raise PackageNotFoundError(name)
        return "5.24.0"

    monkeypatch.setattr(engines, "version", version)


def saved(model_type: str, folder: Path) -> Path:
    tiny_model(model_type).save_pretrained(folder)
    return folder


def rows(*arguments: object) -> dict[str, dict[str, object]]:
    printed = json.loads(run("engines", *arguments, "--json").stdout)
    return {row.pop("engine"): row for row in printed}


@pytest.mark.usefixtures("only_transformers")
def test_what_is_installed() -> None:
    found = rows()
    assert [found[name]["installed"] for name in ("Transformers", "vLLM", "SGLang")] == ["5.24.0", None, None]
    assert found["vLLM"] == {
        "installed": None,
        "tested": "0.26 to 0.33",
        "switch": "MOEGATE=1, VLLM_PLUGINS=moegate",
    }
    printed = run("engines", columns=100).stdout
    assert "patch(model), enable()" in printed
    assert "SGLANG_PLUGINS=moegate" in printed


@pytest.mark.parametrize(
    ("model_type", "routes", "left"),
    [
        ("qwen3_moe", {"Transformers": "2 of 2", "vLLM": "2 of 2", "SGLang": "2 of 2"}, None),
        ("gpt_oss", {"Transformers": "2 of 2", "vLLM": "2 of 2", "SGLang": "2 of 2"}, None),
        ("deepseek_v3", {"Transformers": "1 of 1", "vLLM": "1 of 1", "SGLang": "1 of 1"}, None),
        ("gemma4_text", {"Transformers": "2 of 2", "vLLM": "0 of 2", "SGLang": "0 of 2"}, "per expert scale"),
        ("deepseek_v4", {"Transformers": "2 of 2", "vLLM": "1 of 2", "SGLang": "1 of 2"}, "hash routing"),
        ("kolibri1", {"Transformers": "2 of 2", "vLLM": "0 of 2"}, "a correction bias on the logits"),
    ],
)
@pytest.mark.usefixtures("only_transformers")
def test_what_would_be_routed(model_type: str, routes: dict[str, str], left: str | None, tmp_path: Path) -> None:
    found = rows(saved(model_type, tmp_path))
    assert {name: found[name]["routes"] for name in routes} == {
        name: f"{count} MoE layers" for name, count in routes.items()
    }
    reasons = found["vLLM"]["left"]
    assert isinstance(reasons, dict)
    assert set(reasons.values()) == ({left} if left else set())
    printed = run("engines", tmp_path, columns=120).stdout
    assert (f"is left: {left}" in printed) == (left is not None)


def test_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "version", lambda name: "4.57.0")
    found = rows(saved("qwen3_moe", tmp_path))
    assert found["Transformers"]["routes"] == "Transformers 4.57.0 is outside of the tested range, 5.23 to 5.24"


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "config" in refused("engines", tmp_path)
