"""Whole models on a CPU: vLLM finds the plugin by itself, and moegate routes each layer."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_models
from vllm_layers import in_order

from moegate import RouterSpec, Routing
from moegate.contract.verify import verify_logits, verify_routing
from moegate.routing import RouterTensors

PROGRAM = Path(__file__).parents[2] / "support" / "vllm_program.py"
SPECS = {
    "qwen3_moe": RouterSpec(256, 32, 4, renormalize=True, logits_dtype="bfloat16"),
    # Without the model's factor of 2.5: vLLM's runner multiplies the experts' output by it.
    "deepseek_v3": RouterSpec(
        256,
        32,
        4,
        scoring_func="sigmoid",
        correction_bias="score",
        renormalize=True,
        n_group=4,
        topk_group=2,
        logits_dtype="bfloat16",
    ),
}
LAYERS = {"qwen3_moe": 3, "deepseek_v3": 2}


@dataclass
class Run:
    """One process."""

    found: dict[str, Any]
    log: str


def run(checkpoint: Path, result: Path, *words: str, **environment: str) -> Run:
    """Runs a checkpoint, with vLLM's logging at its defaults."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MOEGATE", "VLLM_LOGGING"))}
    command = [sys.executable, str(PROGRAM), str(checkpoint), str(result), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=clean | environment, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return Run(torch.load(result, weights_only=True), done.stdout + done.stderr)


@pytest.fixture(scope="module", params=list(SPECS))
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Run, Run]:
    """(model type, without moegate, with moegate)"""
    folder = tmp_path_factory.mktemp("runs")
    checkpoint = folder / request.param
    vllm_models.write(request.param, checkpoint)
    without = run(checkpoint, folder / "without.pt")
    return request.param, without, run(checkpoint, folder / "with.pt", MOEGATE="1")


def test_off_changes_nothing(runs: tuple[str, Run, Run]) -> None:
    _, without, _ = runs
    assert set(without.found["classes"].values()) == {"MoERunner"}
    assert "moegate" not in without.log


def test_the_log_says_who_routes(runs: tuple[str, Run, Run]) -> None:
    name, _, on = runs
    assert set(on.found["classes"].values()) == {"MoegateRunner"}
    lines = [line for line in on.log.splitlines() if "moegate" in line]
    assert len(lines) == 1
    assert " INFO " in lines[0]
    assert lines[0].endswith(f"moegate routes {LAYERS[name]} of {LAYERS[name]} MoE layers")


def test_every_layer_keeps_the_contract(runs: tuple[str, Run, Run]) -> None:
    name, _, on = runs
    calls = on.found["calls"]
    assert {call["layer"] for call in calls} == set(on.found["classes"])
    assert len(calls) >= 10 * LAYERS[name]
    for call in calls:
        bias = on.found["biases"][call["layer"]]
        tensors = RouterTensors(e_score_correction_bias=bias)
        assert call["kind"] == "RoutedLogits", "the routing did not come with the logits"
        gate = -on.found["gates"][call["layer"]] if name == "deepseek_v3" else on.found["gates"][call["layer"]]
        assert not verify_logits(call["logits"], call["hidden"], gate, SPECS[name], RouterTensors()).problems
        ours = Routing(call["ids"], call["weights"])
        assert not verify_routing(ours, call["logits"], SPECS[name], tensors).problems


def test_vllm_routes_the_same_within_the_contract(runs: tuple[str, Run, Run]) -> None:
    """vLLM's own router on the same hidden states and logits: the same experts, but for ties."""
    name, _, on = runs
    rows = differing = 0
    for call in on.found["calls"]:
        bias = on.found["biases"][call["layer"]]
        tensors = RouterTensors(e_score_correction_bias=bias)
        ids, weights, spec = call["engine_ids"], call["engine_weights"], SPECS[name]
        if name == "qwen3_moe":  # vLLM's softmax for CPUs computes in the dtype of the logits
            spec, weights = replace(spec, topk_weights_dtype="bfloat16"), weights.bfloat16()
        engine = in_order(ids, weights, call["logits"], spec, tensors)
        nothing = torch.zeros(call["logits"].shape, dtype=torch.float64)
        assert not verify_routing(engine, call["logits"], spec, tensors, logit_error=nothing).problems
        rows += len(ids)
        differing += int((ids.sort(dim=-1).values != call["ids"].sort(dim=-1).values).any(dim=-1).sum())
    assert differing <= 0.1 * rows  # bfloat16 logits tie, and which of two equal experts comes first is vLLM's choice


def test_a_negated_gate_changes_the_tokens(runs: tuple[str, Run, Run]) -> None:
    """A write in place that no version counts takes effect; vLLM has packed its weights, and goes on with these."""
    _, without, on = runs
    assert without.found["tokens of negated gates"] == without.found["tokens"]
    for before, after in zip(on.found["tokens"], on.found["tokens of negated gates"], strict=True):
        assert before != after


def test_a_reload_takes_effect(runs: tuple[str, Run, Run]) -> None:
    name, without, on = runs
    if name == "deepseek_v3":
        assert "tokens after a reload" not in on.found  # vLLM 0.32 cannot reload its latent attention on a CPU
        return
    assert on.found["tokens after a reload"] == on.found["tokens while recording"]
    assert on.found["tokens after a reload"] != on.found["tokens of negated gates"]
    assert on.found["tokens after a reload"][0] == without.found["tokens after a reload"][0]


def test_most_tokens_are_those_of_vllm(runs: tuple[str, Run, Run]) -> None:
    """Not all: after a tie, or a weight that vLLM's router for CPUs rounds to bfloat16, a sequence may part."""
    _, without, on = runs
    same = sum(ours == theirs for ours, theirs in zip(on.found["tokens"], without.found["tokens"], strict=True))
    assert same >= 1
