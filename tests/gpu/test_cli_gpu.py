"""The command line on a GPU: the output of `make demo`."""

import json

import pytest
import torch

pytest.importorskip("typer", reason="the command line needs typer")  # `make test-gpu` uses the host's packages

from command_line import run


def test_route_runs_the_cuda_backend_and_times_it_with_and_without_the_host() -> None:
    facts = json.loads(run("route", "deepseek-v3", "--tokens", 256, "--json").stdout)
    assert facts["backend"] == "cuda"
    assert facts["device"] == {"type": "cuda:0", "name": torch.cuda.get_device_name()}
    assert facts["contract"]["ok"]
    assert 1 < facts["time"]["graph_us"] < facts["time"]["median_us"]
    assert "µs a call in a CUDA graph" in run("route", "deepseek-v3").stdout


def test_check_holds_every_backend_against_float64() -> None:
    result = run("check", "--json")
    assert result.exit_code == 0
    assert {"torch", "cuda"} <= {row["backend"] for row in json.loads(result.stdout)["checks"]}
