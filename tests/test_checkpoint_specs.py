"""Gates of checkpoints with a spec or names of the user, and biases that the spec ignores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import EXPERTS, GATE, HIDDEN, bias, refused, weight, write
from torch import Tensor

from moegate import Gate, RouterSpec, route

NAME = GATE + "weight"
BIAS = GATE + "e_score_correction_bias"
HIDDENS = torch.randn(256, HIDDEN, generator=torch.Generator().manual_seed(0)).bfloat16()


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
    """As after pruning, when the config still states the old number."""
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
    """With a whole spec, no config is read, and the names of all types are tried."""
    write(tmp_path, {NAME: weight(), BIAS: bias()}, "deepseek_v3")
    change(tmp_path / "config.json")
    spec = RouterSpec(HIDDEN, EXPERTS, 3, scoring_func="sigmoid", correction_bias="score")
    gate = Gate.from_checkpoint(tmp_path, 1, spec=spec)
    assert gate.spec is spec
    assert gate.get_buffer("e_score_correction_bias").equal(bias())


def test_a_spec_that_takes_what_no_gate_of_the_type_has(tmp_path: Path) -> None:
    """A linear bias beside the weight, and a correction bias under the name of another type."""
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
    assert gate.get_buffer("e_score_correction_bias").equal(bias(1))  # of the same part of the model


def test_two_names_of_one_type(tmp_path: Path) -> None:
    """A type's alternative names are for different checkpoints; two in one checkpoint are ambiguous."""
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
# Tensors that the spec ignores
# ---------------------------------------------------------------------------------------------------------------------

STRAY = (
    "mlp.gate.e_score_correction_bias",
    "mlp.gate.bias",
    "mlp.expert_bias",
    "mlp.e_score_correction_bias",
    "block_sparse_moe.e_score_correction_bias",
    "mlp.router.bias",
    "mlp.router.expert_bias",  # a known name at a place that no type has
    "mlp.gate.router_bias_fp32",  # the gate's own bias, under an unknown name
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
    """As in early files of MiniMax-M2, whose config.json states minimax, a type with Mixtral's router."""
    block = "model.layers.1.block_sparse_moe."
    tensors = {block + "gate.weight": weight(), block + "e_score_correction_bias": bias()}
    write(tmp_path, tensors, "mixtral")
    refused(tmp_path, block + "e_score_correction_bias")
    gate = Gate.from_checkpoint(
        tmp_path, 1, spec=lambda found: replace(found, scoring_func="sigmoid", correction_bias="score")
    )
    assert gate.get_buffer("e_score_correction_bias").equal(bias())


def test_biases_that_the_type_ignores(tmp_path: Path) -> None:
    """DeepSeek-V4 with a vision encoder: image tokens have their own bias, also in layers with a hash table."""
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
