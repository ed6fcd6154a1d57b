"""`moegate engines`: the table, and what would be routed of a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from command_line import refused, run
from tiny_models import tiny_model

from moegate import RouterSpec
from moegate.integrations import engines, forecast


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
    assert found["vLLM"] == {"installed": None, "range": "0.26 to 0.33", "switch": "MOEGATE=1"}
    printed = run("engines", columns=80).stdout
    assert "Transformers  5.24.0     5.23 to 5.24  patch(model)" in printed
    assert "SGLang        -          0.5.23        MOEGATE=1" in printed


@pytest.mark.parametrize(
    ("model_type", "routes", "left"),
    [
        ("qwen3_moe", {"Transformers": "2 of 2", "vLLM": "2 of 2", "SGLang": "2 of 2"}, None),
        ("gpt_oss", {"Transformers": "2 of 2", "vLLM": "2 of 2", "SGLang": "2 of 2"}, None),
        ("deepseek_v3", {"Transformers": "1 of 1", "vLLM": "1 of 1", "SGLang": "1 of 1"}, None),
        ("gemma4_text", {"Transformers": "2 of 2", "vLLM": "0 of 2", "SGLang": "0 of 2"}, "a scale by expert"),
        ("deepseek_v4", {"Transformers": "2 of 2", "vLLM": "1 of 2", "SGLang": "1 of 2"}, "hash routing"),
        ("llama4_text", {"Transformers": "2 of 2", "vLLM": "0 of 2"}, "a routing function of the model's own"),
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
    count = len(reasons)
    assert (f"vLLM: {count} left: {left}" in printed) == (left is not None)


def test_every_field_of_a_spec_is_told_or_named() -> None:
    """A new field is either what a router of vLLM and SGLang can be told, or a reason."""
    told = {
        *("hidden_size", "num_experts", "top_k", "scoring_func", "correction_bias", "n_group", "topk_group"),
        *("group_score", "renormalize", "renormalize_eps", "routed_scaling_factor", "linear_bias"),
        *("logits_dtype", "weight_dtype", "topk_ids_dtype", "topk_weights_dtype"),
    }
    assert {field.name for field in dataclasses.fields(RouterSpec)} == told | set(forecast._OWN)


def test_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "version", lambda name: "4.57.0")
    found = rows(saved("qwen3_moe", tmp_path))
    assert found["Transformers"]["routes"] == "Transformers 4.57.0 is outside of the range 5.23 to 5.24"


@pytest.mark.usefixtures("only_transformers")
def test_half_precision(tmp_path: Path) -> None:
    """moegate has no logits in float16."""
    tiny_model("qwen3_moe").half().save_pretrained(tmp_path)
    found = rows(tmp_path)
    assert {row["routes"] for row in found.values()} == {"0 of 2 MoE layers"}


def test_no_folder(tmp_path: Path) -> None:
    assert f"no folder {tmp_path / 'gone'}" in refused("engines", tmp_path / "gone")


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "config" in refused("engines", tmp_path)
