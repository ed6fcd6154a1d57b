"""Gates in other forms than a plain weight: quantised, wrapped by PEFT, transposed, beside other gates."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import EXPERTS, GATE, HIDDEN, bias, weight, write
from torch import Tensor

from moegate import Gate

OTHER = {"model.layers.0.mlp.gate.weight": weight(9)}  # a layer whose gate is plain


def refused(folder: Path, *words: str, layer: int = 1, **options: Any) -> str:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        Gate.from_checkpoint(folder, layer, **options)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


QUANTISED: dict[str, tuple[dict[str, Tensor], str, str]] = {
    "GPTQ": (
        {"qweight": ints(8, 16), "qzeros": ints(1, 2), "scales": torch.ones(1, 16), "g_idx": ints(64)},
        "mlp.gate.qweight (GPTQ)",
        "gptq",
    ),
    "AWQ": (
        {"qweight": ints(64, 2), "qzeros": ints(1, 2), "scales": torch.ones(1, 16)},
        "mlp.gate.qweight (AWQ)",
        "awq",
    ),
    "no config says": (
        {"qweight": ints(64, 2), "qzeros": ints(1, 2), "scales": torch.ones(1, 16)},
        "mlp.gate.qweight (GPTQ or AWQ)",
        "",
    ),
    "compressed-tensors": (
        {"weight_packed": ints(16, 8), "weight_scale": torch.ones(16, 1), "weight_shape": ints(2)},
        "mlp.gate.weight_packed (compressed-tensors)",
        "compressed-tensors",
    ),
    "NVFP4 of compressed-tensors": (
        {
            "weight_packed": ints(16, 32, dtype=torch.uint8),
            "weight_scale": torch.ones(16, 4).to(torch.float8_e4m3fn),
            "weight_global_scale": torch.ones(1),
        },
        "NVFP4",
        "compressed-tensors",
    ),
    "NVFP4 of ModelOpt": (
        {
            "weight": ints(16, 32, dtype=torch.uint8),
            "weight_scale": torch.ones(16, 4).to(torch.float8_e4m3fn),
            "weight_scale_2": torch.ones(()),
            "input_scale": torch.ones(()),
        },
        "NVFP4",
        "modelopt",
    ),
    "MLX": (
        {"weight": ints(16, 16), "scales": torch.ones(16, 1), "biases": torch.ones(16, 1)},
        "mlp.gate.scales (MLX)",
        "",
    ),
    "bitsandbytes, 4 bits": (
        {
            "weight": ints(512, 1, dtype=torch.uint8),
            "weight.absmax": ints(16, dtype=torch.uint8),
            "weight.quant_map": torch.ones(16),
            "weight.quant_state.bitsandbytes__nf4": ints(80, dtype=torch.uint8),
        },
        "bitsandbytes",
        "bitsandbytes",
    ),
    "bitsandbytes, 8 bits": (
        {"weight": ints(16, 64, dtype=torch.int8), "SCB": torch.ones(16), "weight_format": ints(1, dtype=torch.uint8)},
        "bitsandbytes",
        "bitsandbytes",
    ),
    "EETQ": ({"weight": ints(64, 16, dtype=torch.int8), "weight_scales": torch.ones(16)}, "EETQ", "eetq"),
    "HIGGS": ({"weight": ints(16, 16), "scales": torch.ones(16, 1), "tables": torch.ones(16, 2)}, "HIGGS", "higgs"),
    "HQQ": ({"W_q": ints(8, 64, dtype=torch.uint8), "scale": torch.ones(16, 1), "zero": torch.ones(16, 1)}, "HQQ", ""),
    "torchao": ({"_weight_qdata": ints(16, 64, dtype=torch.int8), "_weight_scale": torch.ones(16)}, "torchao", ""),
    "MXFP4": (
        {"weight_blocks": ints(16, 2, 16, dtype=torch.uint8), "weight_scales": ints(16, 2, dtype=torch.uint8)},
        "weight_",
        "mxfp4",
    ),
    "MXFP8": (
        {"weight": torch.ones(16, 64).to(torch.float8_e4m3fn), "weight_scale": ints(16, 2, dtype=torch.uint8)},
        "MXFP8",
        "mxfp8",
    ),
    "MXFP8 in its own dtype": (
        {
            "weight": torch.ones(16, 64).to(torch.float8_e4m3fn),
            "weight_scale_inv": torch.ones(16, 2).to(torch.float8_e8m0fnu),
        },
        "MXFP8",
        "fp8",
    ),
    "INT8": (
        {"weight": ints(16, 64, dtype=torch.int8), "weight_scale": torch.ones(16, 1)},
        "torch.int8",
        "compressed-tensors",
    ),
    "a format of tomorrow": ({"trits": ints(16, 13, dtype=torch.uint8)}, "mlp.gate.trits", ""),
}


@pytest.mark.parametrize(("tensors", "message", "method"), QUANTISED.values(), ids=QUANTISED)
def test_quantised(tensors: dict[str, Tensor], message: str, method: str, tmp_path: Path) -> None:
    """The error names the tensor and the format; the layer counts as one with a router."""
    stored = {GATE + name: tensor for name, tensor in tensors.items()}
    write(tmp_path, stored | OTHER, quantization_config={"quant_method": method} if method else None)
    refused(tmp_path, message, "mlp.gate.", "allowed: bfloat16")
    assert "layers with a router: 0-1" in refused(tmp_path, "layer = 7", layer=7)
    assert Gate.from_checkpoint(tmp_path, 0).weight.equal(weight(9))


def test_quantised_under_peft(tmp_path: Path) -> None:
    refused(write(tmp_path, {GATE + "base_layer.qweight": ints(8, 16)}), "layer 1's gate is stored as", "qweight")


FLOAT8 = torch.float8_e4m3fn


def by_element(scale: Tensor, rows: int, columns: int) -> Tensor:
    """The scale of every element of a weight of blocks, the oracle of the tests below."""
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
    """Blocks of the size that the config states, cut at the edges (3 x 7), or of the only size that divides."""
    shape = (-(-EXPERTS // block[0]), -(-HIDDEN // block[1]))
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(3)) + 0.5
    quantised = {"quant_method": "fp8", **({"weight_block_size": list(block)} if stated else {})}
    stored = float8_checkpoint(tmp_path, scale, quantization_config=quantised)
    # A product in float32 and a rounding to bfloat16 are a rounding of the exact product, but for double roundings.
    expected = (stored * by_element(scale.double(), *block)).float().bfloat16()
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal(expected)


def test_float8_blocks_of_128_are_meant_where_they_fit(tmp_path: Path) -> None:
    """160 experts in 2 rows of blocks: 128 and 32 of them, as DeepSeek-V3's format cuts, not twice 80."""
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
    """DeepSeek-V3.1's scales are powers of two, and may be stored as such."""
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
    """The tensor that counts is read, with a word."""
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


@pytest.mark.parametrize("name", ["_orig_mod.mlp.gate.weight", "mlp._fsdp_wrapped_module.gate.weight"])
def test_names_of_wrappers_that_change_nothing(name: str, tmp_path: Path) -> None:
    write(tmp_path, {f"_orig_mod.model.layers.1.{name}": weight()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Gate.from_checkpoint(tmp_path, 1).weight.equal(weight())


def test_two_adapters(tmp_path: Path) -> None:
    names = [f"{GATE}modules_to_save.{adapter}.weight" for adapter in ("default", "other")]
    refused(write(tmp_path, {name: weight() for name in names}), "more than one", *names)


@pytest.mark.parametrize("base", ["base_layer.weight", "weight"])
@pytest.mark.parametrize("adapter", ["lora_A.default.weight", "lora_B.weight", "lora_magnitude_vector.default.weight"])
def test_an_adapter_that_is_not_merged(base: str, adapter: str, tmp_path: Path) -> None:
    """The weight alone would route otherwise than the model: only who asks for that gets it."""
    write(tmp_path, {GATE + base: weight(), GATE + adapter: torch.ones(4, 64)})
    refused(tmp_path, "has an adapter, mlp.gate.lora_", "merged", "tensors=")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's names: above
        gate = Gate.from_checkpoint(tmp_path, 1, tensors={"weight": GATE + base})
    assert gate.weight.equal(weight())


def test_a_folder_of_an_adapter(tmp_path: Path) -> None:
    write(tmp_path, {GATE + "weight": weight()})
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, "holds a PEFT adapter without its model")


@pytest.mark.parametrize("transposed", [True, False])
def test_gates_of_paddle(transposed: bool, tmp_path: Path) -> None:
    """Files of ERNIE-4.5 for Paddle hold [K, N], those for Transformers [N, K]."""
    plain = weight(0, torch.float32)
    name = "ernie.layers.1.mlp."
    statics = {name + "moe_statics.e_score_correction_bias": bias().reshape(1, -1)}
    write(tmp_path, {name + "gate.weight": plain.T if transposed else plain, **statics}, "ernie4_5_moe")
    gate = Gate.from_checkpoint(tmp_path, 1)
    assert gate.weight.equal(plain)
    assert gate.get_buffer("e_score_correction_bias").equal(bias())


def test_a_transposed_gate_in_float8(tmp_path: Path) -> None:
    stored = weight(1, torch.float32).T.contiguous().to(FLOAT8)
    scale = torch.rand(HIDDEN, 1, generator=torch.Generator().manual_seed(3)) + 0.5  # a row of what is stored
    tensors = {"weight": stored, "weight_scale": scale, "moe_statics.e_score_correction_bias": bias()}
    write(tmp_path, {GATE + name: tensor for name, tensor in tensors.items()}, "ernie4_5_moe")
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal((stored.float() * scale).T)


def test_a_square_gate_may_be_either(tmp_path: Path) -> None:
    tensors = {GATE + "weight": torch.eye(64), "model.layers.1.mlp.moe_statics.e_score_correction_bias": torch.ones(64)}
    write(tmp_path, tensors, "ernie4_5_moe", moe_num_experts=64)
    refused(tmp_path, "is square")


STRAY = (
    "vision_tower.encoder.layers.1.",
    "model.visual.layers.1.",
    "model.vision_model.encoder.layers.1.",
    "audio_tower.layers.1.",
    "model.mtp_layers.layers.1.",
    "mtp.layers.1.",
    "draft_model.model.layers.1.",
    "eagle.layers.1.",
    "talker.code_predictor.model.layers.1.",
    "speculator.layers.1.",
    "model.layers.1.mtp_block.layers.1.",
)


@pytest.mark.parametrize("part", STRAY)
@pytest.mark.parametrize("own", ["model.language_model.layers.", "language_model.model.layers.", "layers."])
def test_gates_of_other_parts(part: str, own: str, tmp_path: Path) -> None:
    """Layers of towers, draft heads and the like count from 0 again; the gates of the text are meant."""
    stray = {part + "mlp.gate.weight": weight(7), part.replace("1", "5") + "mlp.gate.weight": weight(8)}
    write(tmp_path, {own + "1.mlp.gate.weight": weight(), **stray})
    assert Gate.from_checkpoint(tmp_path, 1).weight.equal(weight())
    assert list(Gate.all_from_checkpoint(tmp_path)) == [1]


def test_only_gates_of_other_parts(tmp_path: Path) -> None:
    write(tmp_path, {"draft_model.layers.0.mlp.gate.weight": weight()})
    refused(tmp_path, "no layer has a mlp.gate.weight", "draft_model", layer=0)
    named = {"weight": "draft_model.layers.0.mlp.gate.weight"}
    assert Gate.from_checkpoint(tmp_path, 0, tensors=named).weight.equal(weight())


def test_a_named_gate_takes_nothing_of_other_parts(tmp_path: Path) -> None:
    """A draft head's gate does not get the bias of the model's layer of the same number."""
    draft = "mtp.layers.1.mlp.gate."
    tensors = {GATE + "weight": weight(), GATE + "e_score_correction_bias": bias(), draft + "weight": weight(1)}
    write(tmp_path, tensors, "deepseek_v3")
    named = {"weight": draft + "weight"}
    refused(tmp_path, "no e_score_correction_bias of layer 1", tensors=named)
