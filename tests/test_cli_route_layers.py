"""`moegate route` with several layers, and with options that change the spec."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_checkpoints import EXPERTS, HIDDEN, bias, weight, write
from torch import Tensor

from moegate import Gate, RouterSpec, Routing, catalog
from moegate.synthetic import random_gate, random_hidden, random_input_ids

LAYERS = (1, 2, 4, 5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates in layers 1, 2, 4 and 5; layer 6 is a multi-token-prediction head."""
    made = {"weight": weight, "e_score_correction_bias": bias}
    tensors = {
        f"model.layers.{layer}.mlp.gate.{name}": make(layer) for layer in (*LAYERS, 6) for name, make in made.items()
    }
    return write(tmp_path_factory.mktemp("routed"), tensors, "deepseek_v3", num_hidden_layers=6)


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", LAYERS), ("1-2", (1, 2)), ("4,1-2", (1, 2, 4)), ("5, 1", (1, 5)), ("2,1-2,1", (1, 2)), ("5-6", (5, 6))],
)
def test_layers(text: str, layers: tuple[int, ...], checkpoint: Path, tmp_path: Path) -> None:
    """Each layer's ids, weights and logits are what its gate returns for the same hidden states."""
    out = tmp_path / "out.safetensors"
    options = ("--tokens", 20, "--seed", 3, "--device", "cpu")
    result = run("route", checkpoint, "--layer", text, *options, "--out", out, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert [fact["layer"] for fact in facts] == list(layers)
    written = load_file(out)
    assert len(written) == 3 * len(layers)
    for fact, layer in zip(facts, layers, strict=True):
        gate = Gate.from_checkpoint(checkpoint, layer)
        expected = gate(random_hidden(gate.spec, 20, 3), return_logits=True)
        assert written[f"layers.{layer}.topk_ids"].equal(expected.topk_ids)
        assert written[f"layers.{layer}.topk_weights"].equal(expected.topk_weights)
        assert expected.logits is not None
        assert written[f"layers.{layer}.logits"].equal(expected.logits)
        load = torch.bincount(expected.topk_ids.flatten().long(), minlength=EXPERTS)
        assert fact["load"]["experts"] == load.tolist()
        assert fact["contract"] == {"ok": True, "rows": 20, "excused_rows": 0, "problems": []}
        assert RouterSpec(**fact["spec"]) == gate.spec
    with safe_open(out, framework="pt") as opened:
        specs = json.loads(opened.metadata()["specs"])
    assert {layer: RouterSpec(**spec) for layer, spec in specs.items()} == {
        str(fact["layer"]): RouterSpec(**fact["spec"]) for fact in facts
    }


def test_a_row_for_each_layer(checkpoint: Path) -> None:
    result = run("route", checkpoint, "--layer", "all", "--tokens", 50, "--device", "cpu")
    lines = result.stdout.splitlines()
    rows = [line.split() for line in lines if line.split()[1:2] == ["kept"]]
    for row, layer in zip(rows, LAYERS, strict=True):
        gate = Gate.from_checkpoint(checkpoint, layer)
        ids = gate(random_hidden(gate.spec, 50)).topk_ids
        load = torch.bincount(ids.flatten().long(), minlength=EXPERTS)
        spread = [f"{int(load.min())}", "12.5", f"{int(load.max())}", f"{int((load == 0).sum())}"]
        assert row[:7] == [f"{layer}", "kept", "0", *spread]
    assert "layers 1-2, 4-5, 50 tokens" in lines[0]
    assert any("4 of" not in line and "2 of 4 groups" in line and "top 4" in line for line in lines)
    table = [line for line in lines if line[:8].strip()[:1].isdigit() or "contract" in line]
    assert max(map(len, table)) <= 80
    assert result.stderr.splitlines() == [f"layer {layer}: kept" for layer in LAYERS]


def test_one_layer_has_the_whole_report(checkpoint: Path) -> None:
    for text in ("4", "4-4"):
        result = run("route", checkpoint, "--layer", text, "--device", "cpu")
        assert "choice 1" in result.stdout
        assert f"{checkpoint}, layer 4" in result.stdout.replace("\n", "")
        assert isinstance(
            json.loads(run("route", checkpoint, "--layer", text, "--device", "cpu", "--json").stdout), dict
        )


def test_hidden_states_of_a_file_for_all(checkpoint: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "hidden.safetensors", tmp_path / "out.safetensors"
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(1))
    save_file({"hidden": hidden}, file)
    assert run("route", checkpoint, "--layer", "1-2", "--hidden", file, "--out", out, "--device", "cpu").exit_code == 0
    for layer in (1, 2):
        expected = Gate.from_checkpoint(checkpoint, layer)(hidden).topk_ids
        assert load_file(out)[f"layers.{layer}.topk_ids"].equal(expected)


def test_layers_that_route_by_token_id_among_others(tmp_path: Path) -> None:
    """As in DeepSeek-V4's first layers, whose specs and inputs differ from those of the others."""
    table = torch.arange(4).expand(8, 4).contiguous()
    tensors = {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in (0, 3)}
    tensors |= {"model.layers.0.mlp.gate.tid2eid": table, "model.layers.3.mlp.gate.e_score_correction_bias": bias()}
    write(tmp_path, tensors, "deepseek_v4")
    facts = json.loads(run("route", tmp_path, "--layer", "all", "--device", "cpu", "--json").stdout)
    assert [fact["spec"]["hash_routing"] for fact in facts] == [True, False]
    assert facts[0]["load"]["experts"] == [64] * 4 + [0] * 12
    shown = run("route", tmp_path, "--layer", "all", "--device", "cpu", columns=200).stdout
    assert "(layers 0)" in shown
    assert "(layers 3)" in shown


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3", ("layer = 3", "layers with a router: 1-2, 4-6")),
        ("1-5", ("layer = 3",)),
        ("1-999999999", ("layer = 999999999",)),
        ("2-1", ("--layer: got '2-1'", "all, 3, 3-8")),
        ("", ("--layer: got ''",)),
        ("some", ("--layer: got 'some'",)),
        ("1-", ("--layer: got '1-'",)),
        ("-1", ("--layer: got '-1'",)),
        ("1,,2", ("--layer: got '1,,2'",)),
        ("9999999999", ("--layer: got",)),
    ],
)
def test_layers_that_are_none(text: str, words: tuple[str, ...], checkpoint: Path) -> None:
    line = refused("route", checkpoint, f"--layer={text}")
    for word in words:
        assert word in line


def test_no_layer_has_a_gate(tmp_path: Path) -> None:
    write(tmp_path, {"model.layers.0.mlp.up_proj.weight": weight()})
    assert "no layer has a mlp.gate.weight" in refused("route", tmp_path, "--layer", "all")


def test_another_spec_for_a_name() -> None:
    options = ("--logits-dtype", "float32", "--top-k", 5, "--tokens", 9, "--device", "cpu", "--json")
    facts = json.loads(run("route", "qwen3-30b-a3b", *options).stdout)
    found = catalog.get_spec("qwen3-30b-a3b")
    assert (found.logits_dtype, found.top_k) == ("bfloat16", 8)
    spec = RouterSpec(**facts["spec"])
    assert (spec.logits_dtype, spec.top_k) == ("float32", 5)
    expected = random_gate(spec)(random_hidden(spec, 9))
    assert facts["first_tokens"]["topk_ids"] == expected.topk_ids[:4].tolist()
    assert facts["logits"]["dtype"] == "float32"


def test_another_top_k_of_a_hash_table() -> None:
    facts = json.loads(run("route", "deepseek-v4-flash-hash", "--top-k", 2, "--device", "cpu", "--json").stdout)
    spec = RouterSpec(**facts["spec"])
    expected = random_gate(spec)(random_hidden(spec, 64), input_ids=random_input_ids(64))
    assert facts["first_tokens"]["topk_ids"] == expected.topk_ids[:4].tolist()


@pytest.mark.parametrize("layers", ["1", "1-2"])
def test_another_spec_for_a_checkpoint(layers: str, checkpoint: Path) -> None:
    options = ("--logits-dtype", "bfloat16", "--top-k", 2, "--device", "cpu", "--json")
    facts = json.loads(run("route", checkpoint, "--layer", layers, *options).stdout)
    for fact in facts if isinstance(facts, list) else [facts]:
        assert (fact["spec"]["logits_dtype"], fact["spec"]["top_k"]) == ("bfloat16", 2)
        assert len(fact["first_tokens"]["topk_ids"][0]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--logits-dtype", "float16"), "--logits-dtype: got 'float16'; allowed: float32, bfloat16"),
        (("--top-k", 1000), "top_k"),
    ],
)
def test_specs_that_cannot_be(options: tuple[object, ...], message: str, checkpoint: Path) -> None:
    assert message in refused("route", "qwen3-30b-a3b", "--device", "cpu", *options)
    assert message in refused("route", checkpoint, "--layer", "1-2", "--device", "cpu", *options)


def test_a_broken_layer_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Gate.forward

    def broken(gate: Gate, hidden: Tensor, **options: Any) -> Routing:
        routing = forward(gate, hidden, **options)
        is_second = gate.weight.equal(weight(2))
        return routing._replace(topk_ids=routing.topk_ids.flip(-1)) if is_second else routing

    monkeypatch.setattr(Gate, "forward", broken)
    result = run("route", checkpoint, "--layer", "all", "--device", "cpu")
    assert result.exit_code == 1
    assert "the contract is broken in layers 2; 2: " in result.stderr
    assert [line.split()[1] for line in result.stdout.splitlines() if line[:5].strip().isdigit()] == [
        "kept",
        "BROKEN",
        "kept",
        "kept",
    ]
