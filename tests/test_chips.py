"""GPUs by name: what is known of them, and expected times that are never below the time to read the inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run
from machines import forget

from moegate import catalog, get_spec
from moegate.choice import chips
from moegate.choice.machines import CHIPS, described_machine


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()


@pytest.mark.parametrize(
    ("name", "capability", "num_sms", "bandwidth"),
    [
        ("h100", (9, 0), 132, 3350),
        ("NVIDIA H100 80GB HBM3", (9, 0), 132, 3350),
        ("NVIDIA H100 PCIe", (9, 0), 114, 2000),
        ("H200", (9, 0), 132, 4800),
        ("NVIDIA GH200 480GB", (9, 0), 132, 4000),
        ("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2039),
        ("NVIDIA A100-SXM4-40GB", (8, 0), 108, 1555),
        ("A10G", (8, 6), None, 600),
        ("l40s", (8, 9), 142, 864),
        ("GeForce RTX4090", (8, 9), 128, 1008),
        ("B200", (10, 0), 148, 8000),
        ("gb200", (10, 0), 148, 8000),
        ("B300", (10, 3), None, 8000),
        ("Jetson Thor", (11, 0), 20, 273),
        ("Orin", (8, 7), 16, 204.8),
        ("RTX 5090", (12, 0), 170, 1792),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0), 188, 1597),
        ("RTX PRO 6000", (12, 0), 188, 1792),
        ("nvidia gb10", (12, 1), 48, 273),
    ],
)
def test_names(name: str, capability: tuple[int, int], num_sms: int | None, bandwidth: float) -> None:
    machine = described_machine(name)
    assert machine is not None
    assert (machine.capability, machine.num_sms, machine.bandwidth) == (capability, num_sms, bandwidth)


def test_every_name_is_one_chips() -> None:
    for each in chips._CHIPS:
        assert 10 * each.capability[0] + each.capability[1] in CHIPS
        for name in (each.name, *each.also):
            for written in (name, name.lower().replace(" ", ""), f"NVIDIA {name}", name.upper().replace(" ", "-")):
                assert chips.chip(written) is each, written


@pytest.mark.parametrize("name", ["", "cpu", "cuda", "h10", "RTX 9090", "RTX 4090 Laptop GPU", "MI300X", "sm_90"])
def test_no_names(name: str) -> None:
    assert chips.chip(name) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="the messages name what a machine without a GPU has")
def test_a_misspelt_name_gets_suggestions() -> None:
    assert "did you mean 'RTX 5090'" in refused("explain", "deepseek-v3", "--device", "RTX 5009")
    assert "such as 'H100' or 'RTX 5090'" in refused("explain", "deepseek-v3", "--device", "!")


def told(model: str, device: str, tokens: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(
        run("explain", model, "--device", device, "--tokens", tokens, "--json").stdout
    )
    return found


@pytest.mark.parametrize("device", ["sm_121", "GB10", "Jetson Thor", "H20", "B300", "sm_120", "RTX 5060"])
@pytest.mark.parametrize("model", ["deepseek-v3", "minimax-m2", "mixtral-8x7b"])
def test_no_time_is_below_what_a_chip_reads(model: str, device: str) -> None:
    machine, spec = described_machine(device), get_spec(model)
    assert machine is not None
    assert machine.capability is not None
    bandwidth = machine.bandwidth or chips.most_bandwidth(machine.capability)
    assert bandwidth is not None
    weight_bytes = spec.hidden_size * spec.num_gate_rows * (4 if spec.weight_dtype == "float32" else 2)
    for row in told(model, device, "1,16,64,512,4096"):
        floor = (weight_bytes + row["tokens"] * spec.hidden_size * 2) / (bandwidth * 1e3)
        for us, evidence in [(row["expected_us"], row["evidence"])] + [
            (entry["expected_us"], entry["evidence"]) for entry in row["rejected"]
        ]:
            if us is not None:
                assert us >= floor - 1e-3  # printed with a resolution of a nanosecond
                assert "inferred from NVIDIA H100" in evidence


def test_gb10_is_not_said_to_take_an_h100s_time() -> None:
    h100, gb10 = told("deepseek-v3", "H100", "1")[0], told("deepseek-v3", "sm_121", "1")[0]
    assert h100["evidence"] == "measured on NVIDIA H100 80GB HBM3"
    assert gb10["expected_us"] > 13 > h100["expected_us"]
    assert f"{h100['expected_us']:.2f} us" in gb10["evidence"]
    assert "273 GB/s" in gb10["evidence"]


@pytest.mark.parametrize("device", ["sm_90", "sm_121", "GB10", "B200"])
def test_the_floor_changes_no_choice(device: str) -> None:
    for model in catalog.names()[::9]:
        chosen = [row["kernel"] for row in told(model, device, "1,64,65,256,4096")]
        assert chosen == [row["kernel"] for row in told(model, "H100", "1,64,65,256,4096")]
