"""Gates in float8, with scales by tensor, row or block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import EXPERTS, GATE, HIDDEN, bias, refused, weight, write
from torch import Tensor

from moegate import Gate

FLOAT8 = torch.float8_e4m3fn


def by_element(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The scale of every element of a weight with blocks: the oracle of the tests below."""
    result = torch.empty(EXPERTS, HIDDEN, dtype=torch.float64)
    for row in range(EXPERTS):
        for column in range(HIDDEN):
            result[row, column] = scale[row // rows, column // columns]
    return result


def float8_checkpoint(folder: Path, scale: Tensor, name: str = "weight_scale_inv", **config: Any) -> Tensor:
    stored = weight(1, torch.float32).to(FLOAT8)
    activations = {GATE + "input_scale": torch.ones(1), GATE + "activation_scale": torch.ones(1)}  # not the gate's
    write(folder, {GATE + "weight": stored, GATE + name: scale, **activations}, **config)
    return stored.double()


@pytest.mark.parametrize(("block", "stated"), [((8, 16), True), ((8, 16), False), ((3, 7), True), ((16, 64), False)])
def test_float8_by_blocks(block: tuple[int, int], stated: bool, tmp_path: Path) -> None:
    """Blocks of the size in the config, incomplete at the edges (3 x 7), or of the only size without a remainder."""
    shape = (-(-EXPERTS // block[0]), -(-HIDDEN // block[1]))
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5
    quantised = {"quant_method": "fp8", **({"weight_block_size": list(block)} if stated else {})}
    stored = float8_checkpoint(tmp_path, scale, quantization_config=quantised)
    # A product in float32, rounded to bfloat16, is the exact product rounded once, except for double roundings.
    expected = (stored * by_element(scale.double(), *block)).float().bfloat16()
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal(expected)


def test_float8_blocks_of_128_are_meant_where_they_fit(tmp_path: Path) -> None:
    """160 experts in 2 rows of blocks are 128 and 32 experts, as in DeepSeek-V3's format, not 80 and 80."""
    stored = torch.randn(160, HIDDEN, generator=torch.Generator().manual_seed(0)).to(FLOAT8)
    scale = torch.tensor([[1.0], [4.0]])
    write(tmp_path, {GATE + "weight": stored, GATE + "weight_scale_inv": scale}, num_experts=160)
    factors = torch.cat([torch.ones(128, 1), torch.full((32, 1), 4.0)])
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal((stored.float() * factors).bfloat16())


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (EXPERTS,), (EXPERTS, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float8_by_tensor_and_by_row(name: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    scale = (torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5).to(dtype)
    stored = float8_checkpoint(tmp_path, scale, name, num_hidden_layers=4)
    factors = scale.double().reshape(-1, 1)
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal((stored * factors).float().bfloat16())


def test_float8_scales_of_powers_of_two(tmp_path: Path) -> None:
    """DeepSeek-V3.1's scales are powers of two, which float8_e8m0fnu can store."""
    scale = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    stored = float8_checkpoint(tmp_path, scale.to(torch.float8_e8m0fnu))
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal((stored * by_element(scale.double(), 8, 32)).bfloat16())


@pytest.mark.parametrize(
    ("stated", "dtype"),
    [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32), (None, torch.bfloat16)],
)
def test_float8_becomes_the_dtype_of_the_model(stated: str | None, dtype: torch.dtype, tmp_path: Path) -> None:
    stored = float8_checkpoint(tmp_path, torch.tensor(0.3), torch_dtype=stated)
    gate = Gate.from_checkpoint(tmp_path, 1)
    assert gate.weight.equal((stored.float() * torch.tensor(0.3)).to(dtype))
    assert gate.spec.logits_dtype == ("bfloat16" if dtype == torch.bfloat16 else "float32")


def test_float8_where_the_spec_pins_float32_is_not_rounded(tmp_path: Path) -> None:
    stored = weight(1, torch.float32).to(FLOAT8)
    tensors = {"weight": stored, "weight_scale": torch.tensor(0.3), "moe_statics.e_score_correction_bias": bias()}
    write(tmp_path, {GATE + name: tensor for name, tensor in tensors.items()}, "ernie4_5_moe")
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal(stored.float() * torch.tensor(0.3))


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ({}, ("no scale", "torch.float8_e4m3fn")),
        ({"weight_scale": torch.ones(1), "weight_scale_inv": torch.ones(1)}, ("2 scales",)),
        ({"weight_scale_inv": torch.ones(3, 5)}, ("weight_scale_inv", "[3, 5]", "[16, 64]")),
        ({"weight_scale_inv": torch.ones(2, 2, 2)}, ("[2, 2, 2]",)),
        ({"weight_scale_inv": torch.ones(0, 2)}, ("[0, 2]",)),
        ({"weight_scale_inv": torch.ones(0).to(torch.float8_e8m0fnu)}, ("[0]",)),
        ({"weight_scale": torch.ones(1, dtype=torch.int32)}, ("weight_scale has dtype torch.int32",)),
    ],
)
def test_float8_with_scales_that_do_not_fit(scale: dict[str, Tensor], words: tuple[str, ...], tmp_path: Path) -> None:
    scales = {GATE + name: tensor for name, tensor in scale.items()}
    write(tmp_path, {GATE + "weight": weight().to(FLOAT8), **scales})
    refused(tmp_path, GATE + "weight", *words)


def test_float8_blocks_of_another_size_than_stated(tmp_path: Path) -> None:
    float8_checkpoint(tmp_path, torch.ones(2, 4), quantization_config={"weight_block_size": [4, 16]})
    refused(tmp_path, "weight_scale_inv has shape [2, 4]", "[4, 4] for blocks of [4, 16]")


def test_a_scale_beside_a_plain_weight(tmp_path: Path) -> None:
    write(tmp_path, {GATE + "weight": weight(), GATE + "weight_scale": torch.ones(1)})
    refused(tmp_path, "in torch.bfloat16 with model.layers.1.mlp.gate.weight_scale")


def test_a_transposed_gate_in_float8(tmp_path: Path) -> None:
    stored = weight(1, torch.float32).T.contiguous().to(FLOAT8)
    scale = torch.rand(HIDDEN, 1, generator=torch.Generator().manual_seed(3)) + 0.5  # one scale for each stored row
    tensors = {"weight": stored, "weight_scale": scale, "moe_statics.e_score_correction_bias": bias()}
    write(tmp_path, {GATE + name: tensor for name, tensor in tensors.items()}, "ernie4_5_moe")
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal((stored.float() * scale).T)
