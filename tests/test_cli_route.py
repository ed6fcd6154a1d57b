"""`moegate route`: prints and writes what the gate returns, and names wrong arguments."""

import json
from pathlib import Path

import pytest
import torch
from command_line import refused, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

import moegate
from moegate import Gate, RouterSpec, catalog
from moegate.synthetic import random_gate, random_hidden, random_input_ids


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3: layer 0 is dense, layer 1 has a router."""
    folder = tmp_path_factory.mktemp("deepseek_v3")
    tiny_model("deepseek_v3").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v4-flash-hash", "inkling", "longcat-flash"])
def test_route_writes_what_the_gate_returns(name: str, tmp_path: Path) -> None:
    out = tmp_path / "routing.safetensors"
    result = run("route", name, "--tokens", 9, "--seed", 5, "--device", "cpu", "--out", out)
    assert result.exit_code == 0
    spec = catalog.get_spec(name)
    input_ids = random_input_ids(9, 5) if spec.hash_routing else None
    gate = random_gate(spec, 5)
    expected = gate(random_hidden(spec, 9, 5), input_ids=input_ids, return_logits=True)

    written = load_file(out)
    parts = {part: tensor for part, tensor in expected._asdict().items() if tensor is not None}
    assert written.keys() == parts.keys()
    for part, tensor in parts.items():
        assert torch.equal(written[part], tensor), part
    with safe_open(out, framework="pt") as opened:
        metadata = opened.metadata()
    assert RouterSpec(**json.loads(metadata["spec"])) == spec
    assert (metadata["source"], metadata["moegate"]) == (name, moegate.__version__)


def test_route_json_agrees_with_the_gate() -> None:
    arguments = ("route", "longcat-flash", "--tokens", 200, "--device", "cpu", "--json")
    facts = json.loads(run(*arguments).stdout)
    spec = catalog.get_spec("longcat-flash")
    routing = random_gate(spec)(random_hidden(spec, 200))
    load = torch.bincount(routing.topk_ids.flatten().long(), minlength=768)
    assert facts["load"] == {"experts": load[:512].tolist(), "zero_experts": load[512:].tolist()}
    assert facts["first_tokens"]["topk_ids"] == routing.topk_ids[:4].tolist()
    assert facts["first_tokens"]["identity_weight"] == pytest.approx(routing.identity_weight[:4].tolist())
    assert facts["contract"] == {"ok": True, "rows": 200, "excused_rows": 0, "problems": []}
    assert 0 < facts["logits"]["share_of_bound"] < 1
    assert facts["time"]["median_us"] > 0
    assert RouterSpec(**facts["spec"]) == spec


def test_route_shows_ids_weights_and_load() -> None:
    spec = catalog.get_spec("longcat-flash")
    routing = random_gate(spec)(random_hidden(spec, 64))
    result = run("route", "longcat-flash", "--device", "cpu")
    best = zip(routing.topk_ids[:4, 0].tolist(), routing.topk_weights[:4, 0].tolist(), strict=True)
    cells = [cell for id, weight in best for cell in (f"{id}{'z' if id >= 512 else ''}", f"{weight:.4f}")]
    row = next(line for line in result.stdout.splitlines() if line.startswith("choice 1 "))
    assert row.split()[2:] == cells
    bars = "".join(line[10:] for line in result.stdout.splitlines() if line[:8].strip().isdigit())
    load = torch.bincount(routing.topk_ids.flatten().long(), minlength=768)
    assert len(bars) == 768
    assert [bar == "·" for bar in bars] == (load == 0).tolist()
    assert {index for index, bar in enumerate(bars) if bar == "█"} >= set((load == load.max()).nonzero()[:, 0].tolist())
    # The last line ends in the name of the CPU, which may be long.
    assert max(len(line) for line in result.stdout.splitlines() if not line.startswith("time ")) <= 80


def test_route_takes_hidden_states_from_a_file(tmp_path: Path) -> None:
    file, out = tmp_path / "hidden.safetensors", tmp_path / "out.safetensors"
    spec = catalog.get_spec("deepseek-v4-flash-hash")
    hidden, input_ids = random_hidden(spec, 7, seed=3), random_input_ids(7, seed=3)
    save_file({"hidden": hidden, "input_ids": input_ids, "other": torch.zeros(2, 2)}, file)
    assert run("route", "deepseek-v4-flash-hash", "--hidden", file, "--device", "cpu", "--out", out).exit_code == 0
    expected = random_gate(spec)(hidden, input_ids=input_ids)
    assert torch.equal(load_file(out)["topk_ids"], expected.topk_ids)
    assert torch.equal(load_file(out)["topk_weights"], expected.topk_weights)


def test_route_takes_no_tokens_and_nan(tmp_path: Path) -> None:
    file = tmp_path / "hidden.safetensors"
    for hidden in (torch.zeros(0, 4096), torch.full((2, 4096), torch.nan)):
        save_file({"x": hidden}, file)
        result = run("route", "mixtral-8x7b", "--hidden", file, "--device", "cpu", "--json")
        assert result.exit_code == 0
        assert json.loads(result.stdout)["tokens"] == len(hidden)  # parses: JSON has no NaN
        assert "NaN" not in result.stdout
        assert run("route", "mixtral-8x7b", "--hidden", file, "--device", "cpu").exit_code == 0


def test_route_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    result = run("route", checkpoint, "--layer", 1, "--tokens", 20, "--seed", 2, "--device", "cpu", "--out", out)
    assert result.exit_code == 0
    gate = Gate.from_checkpoint(checkpoint, 1)
    expected = gate(random_hidden(gate.spec, 20, 2), return_logits=True)
    written = load_file(out)
    assert torch.equal(written["topk_ids"], expected.topk_ids)
    assert torch.equal(written["logits"], expected.logits)


def test_route_names_the_layers_with_a_router(checkpoint: Path) -> None:
    assert "layers with a router: 1" in refused("route", checkpoint)
    assert "layers with a router: 1" in refused("route", checkpoint, "--layer", 0)


def test_route_reports_a_corrupt_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        broken = file.suffix == ".safetensors"
        (tmp_path / file.name).write_bytes(content[: len(content) // 2] if broken else content)
    assert "safetensors" in refused("route", tmp_path, "--layer", 1)
    (tmp_path / "config.json").write_text("{")
    assert "not JSON" in refused("route", tmp_path, "--layer", 1)


def test_route_reports_a_bad_file_of_hidden_states(tmp_path: Path) -> None:
    file = tmp_path / "hidden.safetensors"
    route = ("route", "mixtral-8x7b", "--device", "cpu", "--hidden", file)
    assert "no file" in refused(*route)
    file.write_bytes(b"not a safetensors file")
    assert str(file) in refused(*route)
    save_file({"a": torch.zeros(2, 4096), "b": torch.zeros(3, 4096)}, file)
    assert "a [2, 4096]" in refused(*route)
    save_file({"a": torch.zeros(2, 4095)}, file)
    assert "[2, 4095]" in refused(*route)
    save_file({"a": torch.zeros(2, 4096, dtype=torch.float64)}, file)
    assert "float64" in refused(*route)
    save_file({"a": torch.zeros(2, 4096)}, file)
    assert "--tokens" in refused(*route, "--tokens", 3)
    by_token = ("route", "deepseek-v4-flash-hash", "--device", "cpu", "--hidden", file)
    assert "input_ids" in refused(*by_token)
    save_file({"a": torch.zeros(2, 4096), "input_ids": torch.tensor([0, 10**6])}, file)
    assert "input_ids: got 1000000" in refused(*by_token)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deepsek-v3",), "did you mean 'deepseek-v3'"),
        (("no/such/folder", "--layer", 3), "no folder no/such/folder"),
        (("mixtral-8x7b", "--layer", 3), "--layer"),
        (("mixtral-8x7b", "--device", "abacus"), "allowed here: cpu"),
        (("mixtral-8x7b", "--device", "cuda:99"), "allowed here: cpu"),
        (("mixtral-8x7b", "--out", "no/such/folder/x.safetensors"), "no folder no/such/folder"),
        (("mixtral-8x7b", "--out", "."), "is a folder"),
        (("mixtral-8x7b", "--hidden", "./x.safetensors", "--out", "x.safetensors"), "is the file of --hidden"),
    ],
)
def test_route_refuses(arguments: tuple[object, ...], message: str) -> None:
    assert message in refused("route", *arguments)
