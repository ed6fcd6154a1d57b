"""Gates that PEFT wrapped: trained as a whole (`modules_to_save`), beside the untrained copy, or with adapters."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from small_checkpoints import GATE, bias, refused, weight, write

from moegate import Gate

BIAS = "e_score_correction_bias"


def trained(adapter: str = "default", outer: str = "model.layers.1.mlp.gate.", inner: str = "") -> tuple[str, str]:
    """The prefixes of the tensors of the trained copy and of the untrained copy."""
    return f"{outer}modules_to_save.{adapter}.{inner}", f"{outer}original_module.{inner}"


PLACES = {
    "the gate": trained(),
    "another adapter's": trained("mine"),
    "of PeftModel": trained(outer="base_model.model.model.layers.1.mlp.gate."),
    "the block around it": trained(outer="model.layers.1.mlp.", inner="gate."),
    "the whole model": trained(outer="base_model.model.model.", inner="layers.1.mlp.gate."),
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_the_trained_copy_of_a_gate_with_a_bias(places: tuple[str, str], tmp_path: Path) -> None:
    new, old = places
    tensors = {new + "weight": weight(1), new + BIAS: bias(1), old + "weight": weight(2), old + BIAS: bias(2)}
    write(tmp_path, tensors, "deepseek_v3")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gate = Gate.from_checkpoint(tmp_path, 1)
    assert ["PEFT" in str(warning.message) for warning in caught] == [True]
    assert gate.weight.equal(weight(1))
    assert gate.get_buffer(BIAS).equal(bias(1))


@pytest.mark.parametrize("leaf", ["weight_scale", "lora_A.default.weight", "qweight", "bias"])
def test_nothing_of_the_untrained_copy_counts(leaf: str, tmp_path: Path) -> None:
    new, old = trained()
    write(tmp_path, {new + "weight": weight(1), old + "weight": weight(2), old + leaf: bias()})
    with pytest.warns(RuntimeWarning, match="PEFT"):
        assert Gate.from_checkpoint(tmp_path, 1).weight.equal(weight(1))


def test_a_bias_of_the_trained_copy_that_the_spec_does_not_take(tmp_path: Path) -> None:
    new, old = trained()
    write(tmp_path, {new + "weight": weight(), new + BIAS: bias(), old + "weight": weight(), old + BIAS: bias()})
    with pytest.raises(ValueError, match=r"holds \S*modules_to_save\.default\.e_score_correction_bias, which the spec"):
        Gate.from_checkpoint(tmp_path, 1)


@pytest.mark.parametrize("leaf", ["weight", BIAS])
def test_two_adapters_beside_the_untrained_copy(leaf: str, tmp_path: Path) -> None:
    new, old = trained()
    tensors = {new + "weight": weight(1), new + BIAS: bias(1), old + "weight": weight(2), old + BIAS: bias(2)}
    other = trained("other")[0] + leaf
    write(tmp_path, tensors | {other: tensors[new + leaf].clone()}, "deepseek_v3")
    with pytest.raises(ValueError, match="more than one tensor") as caught:
        Gate.from_checkpoint(tmp_path, 1)
    assert other in str(caught.value)


def test_the_untrained_copy_by_its_name(tmp_path: Path) -> None:
    """A tensor given by its full name is read, even from the untrained copy."""
    new, old = trained()
    write(tmp_path, {new + "weight": weight(1), old + "weight": weight(2)})
    gate = Gate.from_checkpoint(tmp_path, 1, tensors={"weight": GATE + "original_module.weight"})
    assert gate.weight.equal(weight(2))


PEFT = {
    "base layer": ("model.layers.1.mlp.gate.base_layer.weight",),
    "saved as a module": ("model.layers.1.mlp.gate.modules_to_save.default.weight",),
    "another adapter's": ("model.layers.1.mlp.gate.modules_to_save.mine.weight",),
    "of PeftModel": ("base_model.model.model.layers.1.mlp.gate.base_layer.weight",),
    "beside what it was": (
        "model.layers.1.mlp.gate.modules_to_save.default.weight",
        "model.layers.1.mlp.gate.original_module.weight",
    ),
    "the block around it": ("model.layers.1.mlp.modules_to_save.default.gate.weight",),
}


@pytest.mark.parametrize("names", PEFT.values(), ids=PEFT)
def test_names_of_peft(names: tuple[str, ...], tmp_path: Path) -> None:
    """The trained tensor is read, with a warning."""
    write(tmp_path, {name: weight(seed) for seed, name in enumerate(names)})
    with pytest.warns(RuntimeWarning, match="PEFT"):
        assert Gate.from_checkpoint(tmp_path, 1).weight.equal(weight(0))


def test_names_of_peft_of_a_bias(tmp_path: Path) -> None:
    module = GATE + "modules_to_save.default."
    tensors = {module + "weight": weight(), module + "e_score_correction_bias": bias()}
    write(tmp_path, tensors, "deepseek_v3")
    with pytest.warns(RuntimeWarning, match="PEFT"):
        gate = Gate.from_checkpoint(tmp_path, 1)
    assert gate.get_buffer("e_score_correction_bias").equal(bias())


def test_two_adapters(tmp_path: Path) -> None:
    names = [f"{GATE}modules_to_save.{adapter}.weight" for adapter in ("default", "other")]
    refused(write(tmp_path, {name: weight() for name in names}), "more than one", *names)


@pytest.mark.parametrize("base", ["base_layer.weight", "weight"])
@pytest.mark.parametrize("adapter", ["lora_A.default.weight", "lora_B.weight", "lora_magnitude_vector.default.weight"])
def test_an_adapter_that_is_not_merged(base: str, adapter: str, tmp_path: Path) -> None:
    """The weight alone routes unlike the model, and is read only if the user names it."""
    write(tmp_path, {GATE + base: weight(), GATE + adapter: torch.ones(4, 64)})
    refused(tmp_path, "has an adapter, mlp.gate.lora_", "merged", "tensors=")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning of PEFT's names, tested above
        gate = Gate.from_checkpoint(tmp_path, 1, tensors={"weight": GATE + base})
    assert gate.weight.equal(weight())


def test_a_folder_of_an_adapter(tmp_path: Path) -> None:
    write(tmp_path, {GATE + "weight": weight()})
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "holds a PEFT adapter without its model")
