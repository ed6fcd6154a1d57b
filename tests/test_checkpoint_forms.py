"""Gates in other forms than a plain weight: quantised, wrapped, transposed, beside other gates."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from small_checkpoints import GATE, bias, refused, weight, write
from torch import Tensor

from moegate import Gate

OTHER = {"model.layers.0.mlp.gate.weight": weight(9)}  # a layer whose gate is plain


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


@pytest.mark.parametrize("name", ["_orig_mod.mlp.gate.weight", "mlp._fsdp_wrapped_module.gate.weight"])
def test_names_of_wrappers_that_change_nothing(name: str, tmp_path: Path) -> None:
    write(tmp_path, {f"_orig_mod.model.layers.1.{name}": weight()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Gate.from_checkpoint(tmp_path, 1).weight.equal(weight())


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
    """Layers of encoders and draft heads are counted from 0 again; the text model's gates are read."""
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
    """A draft head's gate does not get the bias of the model's layer with the same number."""
    draft = "mtp.layers.1.mlp.gate."
    tensors = {GATE + "weight": weight(), GATE + "e_score_correction_bias": bias(), draft + "weight": weight(1)}
    write(tmp_path, tensors, "deepseek_v3")
    named = {"weight": draft + "weight"}
    refused(tmp_path, "no e_score_correction_bias of layer 1", tensors=named)
