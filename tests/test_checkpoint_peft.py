"""What PEFT trained whole (`modules_to_save`), saved beside what was there before."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from small_checkpoints import GATE, bias, weight, write

from moegate import Gate

BIAS = "e_score_correction_bias"


def trained(adapter: str = "default", outer: str = "model.layers.1.mlp.gate.", inner: str = "") -> tuple[str, str]:
    """What stands before the tensors of the trained copy, and of the untrained one."""
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
    """Who asks for a tensor by its full name gets it."""
    new, old = trained()
    write(tmp_path, {new + "weight": weight(1), old + "weight": weight(2)})
    gate = Gate.from_checkpoint(tmp_path, 1, tensors={"weight": GATE + "original_module.weight"})
    assert gate.weight.equal(weight(2))
