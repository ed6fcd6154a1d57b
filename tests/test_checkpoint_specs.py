"""Gates of checkpoints by a spec and by names of the user's, biases that nobody takes, and all layers in one pass."""

from __future__ import annotations

import gc
import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_checkpoints import EXPERTS, GATE, HIDDEN, bias, config_of, weight, write, write_index
from torch import Tensor

from moegate import Gate, RouterSpec, route

NAME = GATE + "weight"
BIAS = GATE + "e_score_correction_bias"
HIDDENS = torch.randn(256, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()


def refused(path: Path, *words: str, error: type[Exception] = ValueError, layer: int = 1, **options: Any) -> str:
    with pytest.raises(error, match=re.escape(words[0])) as caught:
        Gate.from_checkpoint(path, layer, **options)
    assert type(caught.value) is error
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# spec=
# ---------------------------------------------------------------------------------------------------------------------

CHANGES: dict[str, Callable[[RouterSpec], RouterSpec]] = {
    "float32 logits": lambda found: replace(found, logits_dtype="float32"),
    "another top-k": lambda found: replace(found, top_k=7),
    "weights that are not renormalised": lambda found: replace(found, renormalize=False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_of_the_spec_that_is_found(change: Callable[[RouterSpec], RouterSpec], tmp_path: Path) -> None:
    write(tmp_path, {NAME: weight()})
    found = Gate.from_checkpoint(tmp_path, 1).spec
    assert (found.logits_dtype, found.top_k, found.renormalize) == ("bfloat16", 4, True)
    gate = Gate.from_checkpoint(tmp_path, 1, spec=change)
    assert gate.spec == change(found) != found
    expected = route(HIDDENS, weight(), change(found))
    routing = gate(HIDDENS)
    assert routing.topk_ids.equal(expected.topk_ids)
    assert routing.topk_weights.equal(expected.topk_weights)


def test_another_number_of_experts_in_a_layer(tmp_path: Path) -> None:
    """As after pruning, where the config still says what it was."""
    write(tmp_path, {NAME: weight()[:12]})
    refused(tmp_path, NAME, "[12, 64]", "[16, 64]")
    gate = Gate.from_checkpoint(tmp_path, 1, spec=lambda found: replace(found, num_experts=12))
    assert gate.weight.equal(weight()[:12])
    assert int(gate(HIDDENS).topk_ids.max()) == 11


BROKEN_CONFIGS = {
    "as it is": lambda path: None,
    "missing": lambda path: path.unlink(),
    "of an unknown type": lambda path: path.write_text('{"model_type": "tomorrow"}'),
    "without a type": lambda path: path.write_text("{}"),
}


@pytest.mark.parametrize("change", BROKEN_CONFIGS.values(), ids=BROKEN_CONFIGS)
def test_a_whole_spec(change: Callable[[Path], object], tmp_path: Path) -> None:
    """With it no config is asked; the names of all types are looked for."""
    write(tmp_path, {NAME: weight(), BIAS: bias()}, "deepseek_v3")
    change(tmp_path / "config.json")
    spec = RouterSpec(HIDDEN, EXPERTS, 3, scoring_func="sigmoid", correction_bias="score")
    gate = Gate.from_checkpoint(tmp_path, 1, spec=spec)
    assert gate.spec is spec
    assert gate.get_buffer("e_score_correction_bias").equal(bias())


def test_a_spec_that_takes_what_no_gate_of_the_type_has(tmp_path: Path) -> None:
    """A linear bias beside the weight, and a correction bias under the name that another type has for it."""
    write(tmp_path, {NAME: weight(), GATE + "bias": bias(1), "model.layers.1.mlp.expert_bias": bias(2)})
    gate = Gate.from_checkpoint(
        tmp_path, 1, spec=lambda found: replace(found, linear_bias=True, correction_bias="score")
    )
    assert gate.bias is not None
    assert gate.bias.equal(bias(1))
    assert gate.get_buffer("e_score_correction_bias").equal(bias(2))


@pytest.mark.parametrize(
    ("spec", "word"), [("deepseek-v3", "got str"), (3, "got int"), (lambda found: None, "returns NoneType")]
)
def test_no_spec(spec: Any, word: str, tmp_path: Path) -> None:
    refused(write(tmp_path, {NAME: weight()}), "spec: got", word, error=TypeError, spec=spec)


def test_errors_of_a_change_are_its_own(tmp_path: Path) -> None:
    refused(write(tmp_path, {NAME: weight()}), "top_k", spec=lambda found: replace(found, top_k=17))


# ---------------------------------------------------------------------------------------------------------------------
# tensors=
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.layers.1.router_x.w", "model.layers.{layer}.router_x.w", "router_x.w"])
def test_a_name_of_the_users(name: str, tmp_path: Path) -> None:
    write(tmp_path, {"model.layers.1.router_x.w": weight(), "model.layers.2.router_x.w": weight(2)})
    assert Gate.from_checkpoint(tmp_path, 1, tensors={"weight": name}).weight.equal(weight())


def test_names_of_no_layer(tmp_path: Path) -> None:
    write(tmp_path, {"gates.1.{x}": weight(), "biases.1": bias()}, "deepseek_v3")
    named = {"weight": "gates.{layer}.{x}", "e_score_correction_bias": "biases.{layer}"}
    gate = Gate.from_checkpoint(tmp_path, 1, tensors=named)
    assert gate.weight.equal(weight())
    assert gate.get_buffer("e_score_correction_bias").equal(bias())


def test_a_name_chooses_among_several(tmp_path: Path) -> None:
    tensors = {"ema." + name: tensor for name, tensor in ((NAME, weight(1)), (BIAS, bias(1)))}
    write(tmp_path, {NAME: weight(), BIAS: bias(), **tensors}, "deepseek_v3")
    refused(tmp_path, "more than one tensor", NAME, "ema." + NAME)
    gate = Gate.from_checkpoint(tmp_path, 1, tensors={"weight": "ema." + NAME})
    assert gate.weight.equal(weight(1))
    assert gate.get_buffer("e_score_correction_bias").equal(bias(1))  # of the same part


def test_two_names_of_one_type(tmp_path: Path) -> None:
    """A type's alternatives are of different checkpoints; in one, nothing says which counts."""
    block = "model.layers.1.block_sparse_moe.gate.weight"
    write(tmp_path, {NAME: weight(), block: weight(1)}, "mixtral")
    refused(tmp_path, "more than one tensor", NAME, block)


def test_a_named_float8_weight_is_dequantised(tmp_path: Path) -> None:
    stored = weight().to(torch.float8_e4m3fn)
    write(tmp_path, {"model.layers.1.x.weight": stored, "model.layers.1.x.weight_scale": torch.tensor(2.0)})
    gate = Gate.from_checkpoint(tmp_path, 1, tensors={"weight": "x.weight"})
    assert gate.weight.equal(2 * stored.bfloat16())


@pytest.mark.parametrize(
    ("tensors", "words", "error"),
    [
        ({"wieght": NAME}, ("'wieght'", "weight"), ValueError),
        ({"weight": "model.layers.1.mlp.gate.wight"}, ("no model.layers.1.mlp.gate.wight", NAME), ValueError),
        ({"e_score_correction_bias": NAME}, ("e_score_correction_bias", "takes no such tensor"), ValueError),
        ({"weight": 3}, ("weight = 3",), TypeError),
        ([("weight", NAME)], ("got list",), TypeError),
    ],
)
def test_names_that_are_none(tensors: Any, words: tuple[str, ...], error: type[Exception], tmp_path: Path) -> None:
    refused(write(tmp_path, {NAME: weight()}), "tensors: ", *words, error=error, tensors=tensors)


# ---------------------------------------------------------------------------------------------------------------------
# What nobody takes
# ---------------------------------------------------------------------------------------------------------------------

STRAY = (
    "mlp.gate.e_score_correction_bias",
    "mlp.gate.bias",
    "mlp.expert_bias",
    "mlp.e_score_correction_bias",
    "block_sparse_moe.e_score_correction_bias",
    "mlp.router.bias",
    "mlp.router.expert_bias",  # a known word at a place that no type has
    "mlp.gate.router_bias_fp32",  # the gate's own, under a name that nobody knows
    "mlp.gate.tid2eid",
    "mlp.gate.global_scale",
    "router.per_expert_scale",
)


@pytest.mark.parametrize("stray", STRAY)
@pytest.mark.parametrize(
    "spec", [None, lambda found: found, RouterSpec(HIDDEN, EXPERTS, 4)], ids=["found", "changed", "given"]
)
def test_what_the_spec_does_not_take(stray: str, spec: Any, tmp_path: Path) -> None:
    write(tmp_path, {NAME: weight(), f"model.layers.1.{stray}": bias(), "model.layers.0.mlp.gate.weight": weight(1)})
    refused(tmp_path, f"layer 1 holds model.layers.1.{stray}", "does not take", spec=spec)
    assert Gate.from_checkpoint(tmp_path, 0, spec=spec).weight.equal(weight(1))


def test_a_bias_of_a_type_that_has_none(tmp_path: Path) -> None:
    """As in early files of MiniMax-M2, whose config.json says minimax, which is Mixtral's router."""
    block = "model.layers.1.block_sparse_moe."
    tensors = {block + "gate.weight": weight(), block + "e_score_correction_bias": bias()}
    write(tmp_path, tensors, "mixtral")
    refused(tmp_path, block + "e_score_correction_bias")
    gate = Gate.from_checkpoint(
        tmp_path, 1, spec=lambda found: replace(found, scoring_func="sigmoid", correction_bias="score")
    )
    assert gate.get_buffer("e_score_correction_bias").equal(bias())


def test_biases_that_the_type_ignores(tmp_path: Path) -> None:
    """DeepSeek-V4 with a vision encoder: image tokens have a bias of their own; layers with a table have both, too."""
    table = torch.arange(EXPERTS).expand(8, EXPERTS)[:, :4].contiguous()
    tensors: dict[str, Tensor] = {}
    for layer in (0, 4):
        start = f"layers.{layer}.ffn.gate."
        tensors |= {start + "weight": weight(layer), start + "bias": bias(layer), start + "bias_vl": bias(9)}
    write(tmp_path, tensors | {"layers.0.ffn.gate.tid2eid": table}, "deepseek_v4")
    gates = Gate.all_from_checkpoint(tmp_path)
    assert gates[0].e_score_correction_bias is None
    assert gates[4].get_buffer("e_score_correction_bias").equal(bias(4))
    refused(tmp_path, "layers.4.ffn.gate.bias", layer=4, spec=lambda found: replace(found, correction_bias=None))


def test_a_second_bias(tmp_path: Path) -> None:
    write(tmp_path, {NAME: weight(), BIAS: bias(), GATE + "bias": bias()}, "deepseek_v3")
    refused(tmp_path, f"holds {GATE}bias")


@pytest.mark.parametrize("name", ["mlp.experts.0.down_proj.bias", "self_attn.q_proj.bias", "mlp.shared_expert.bias"])
def test_biases_of_others(name: str, tmp_path: Path) -> None:
    write(tmp_path, {NAME: weight(), f"model.layers.1.{name}": bias(), "mtp.layers.1.mlp.gate.bias": bias()})
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal(weight())


# ---------------------------------------------------------------------------------------------------------------------
# All layers
# ---------------------------------------------------------------------------------------------------------------------


def test_all_are_what_each_is(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{layer}.mlp.gate.{name}": made(layer)
        for layer in (1, 2, 4)
        for name, made in (("weight", weight), ("e_score_correction_bias", bias))
    }
    write(tmp_path, tensors | {"model.layers.0.mlp.up_proj.weight": torch.ones(1)}, "deepseek_v3")
    gates = Gate.all_from_checkpoint(tmp_path)
    assert list(gates) == [1, 2, 4]
    for layer, gate in gates.items():
        alone = Gate.from_checkpoint(tmp_path, layer)
        assert gate.weight.equal(weight(layer))
        assert alone.weight.equal(weight(layer))
        assert gate.get_buffer("e_score_correction_bias").equal(bias(layer))
        assert gate.spec == alone.spec


def test_some(tmp_path: Path) -> None:
    write(tmp_path, {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in range(4)})
    assert list(Gate.all_from_checkpoint(tmp_path, [3, 1, 3])) == [1, 3]
    assert Gate.all_from_checkpoint(tmp_path, ()) == {}
    with pytest.raises(ValueError, match=r"layer = 7; allowed: layers with a router: 0-3"):
        Gate.all_from_checkpoint(tmp_path, (2, 7))
    with pytest.raises(TypeError, match="layer: got bool"):
        Gate.all_from_checkpoint(tmp_path, [True])


def test_none(tmp_path: Path) -> None:
    write(tmp_path, {"model.layers.0.mlp.up_proj.weight": weight()})
    with pytest.raises(ValueError, match=r"no layer has a mlp\.gate\.weight"):
        Gate.all_from_checkpoint(tmp_path)


def test_heads_that_predict_further_tokens_are_asked_for_by_number(tmp_path: Path) -> None:
    """DeepSeek-V3 keeps its one as layer 61 of 61."""
    tensors = {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in range(3)}
    write(tmp_path, tensors, num_hidden_layers=2)
    assert list(Gate.all_from_checkpoint(tmp_path)) == [0, 1]
    assert Gate.from_checkpoint(tmp_path, 2).weight.equal(weight(2))


def test_options_and_names_of_all(tmp_path: Path) -> None:
    write(tmp_path, {f"model.layers.{layer}.x.w": weight(layer) for layer in range(3)})
    gates = Gate.all_from_checkpoint(
        tmp_path,
        spec=lambda found: replace(found, top_k=2),
        tensors={"weight": "model.layers.{layer}.x.w"},
        frozen=False,
    )
    assert {layer: (gate.spec.top_k, gate.frozen) for layer, gate in gates.items()} == dict.fromkeys(
        range(3), (2, False)
    )
    assert all(gate.weight.equal(weight(layer)) for layer, gate in gates.items())
    with pytest.raises(ValueError, match=r"for several layers; allowed: \{layer\}"):
        Gate.all_from_checkpoint(tmp_path, (0, 1), tensors={"weight": "model.layers.0.x.w"})


def test_names_that_only_some_layers_take(tmp_path: Path) -> None:
    """DeepSeek-V4's first layers have a table of token ids, and the others a bias."""
    table = torch.arange(EXPERTS).expand(8, EXPERTS)[:, :4].contiguous()
    tensors: dict[str, Tensor] = {"model.layers.0.x.table": table, "model.layers.4.x.bias": bias()}
    tensors |= {f"model.layers.{layer}.mlp.gate.weight": weight(layer) for layer in (0, 4)}
    write(tmp_path, tensors, "deepseek_v4")
    named = {"tid2eid": "x.table", "e_score_correction_bias": "model.layers.{layer}.x.bias"}
    gates = Gate.all_from_checkpoint(tmp_path, tensors=named)
    assert gates[0].get_buffer("tid2eid").equal(table)
    assert gates[4].get_buffer("e_score_correction_bias").equal(bias())


LAYERS, DENSE, ROUTED = 61, 3, 256
PARTS = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many names as DeepSeek-V3's index has, in one file a layer, with small gates and nothing else in them."""
    folder = tmp_path_factory.mktemp("large")
    weight_map: dict[str, str] = {}
    for layer in range(LAYERS):
        start, file = f"model.layers.{layer}.", f"model-{layer + 1:05d}-of-{LAYERS:05d}.safetensors"
        experts = range(ROUTED if layer >= DENSE else 0)
        names = [f"mlp.experts.{expert}.{part}.weight" for expert in experts for part in PARTS]
        weight_map |= {start + name + end: file for name in names for end in ("", "_scale_inv")}
        if layer >= DENSE:
            gate = {"mlp.gate.weight": weight(layer), "mlp.gate.e_score_correction_bias": bias(layer)}
            weight_map |= {start + name: file for name in gate}
            save_file({start + name: tensor for name, tensor in gate.items()}, folder / file)
    assert len(weight_map) > 89_000
    write_index(folder, weight_map)
    config = config_of("deepseek_v3", num_hidden_layers=LAYERS)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_the_gates_of_a_large_checkpoint_in_two_seconds(large: Path) -> None:
    Gate.from_checkpoint(large, DENSE)  # the catalog and the backend are there
    gc.collect()
    start = time.process_time()  # of this process: other work on the machine does not count
    gates = Gate.all_from_checkpoint(large)
    seconds = time.process_time() - start
    assert list(gates) == list(range(DENSE, LAYERS))
    assert all(gate.weight.equal(weight(layer)) for layer, gate in gates.items())
    assert seconds < 2


def test_each_file_is_opened_once(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(file: Path, **options: Any) -> Any:
        opened.append(file)
        return safe_open(file, **options)

    monkeypatch.setattr("moegate.catalog.files.safe_open", counted)
    Gate.all_from_checkpoint(large)
    assert len(opened) == len(set(opened)) == LAYERS - DENSE
    opened.clear()
    Gate.from_checkpoint(large, 30)
    assert [file.name for file in opened] == ["model-00031-of-00061.safetensors"]
