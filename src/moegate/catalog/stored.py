"""Stored forms of a gate: FP8, which is dequantised by its scales, and other quantised formats, which are refused."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from moegate.catalog.layer_names import ROLES
from moegate.routing import FLOATS, INTEGERS, inputs_of
from moegate.spec import RouterSpec

# The tensors by which a quantised format of a linear layer is recognised; more specific formats come first. Sources:
# Transformers 5.24 (quantizers/, integrations/), vLLM 0.33 (model_executor/layers/quantization/), MLX
# (nn/layers/quantized.py).
_FORMATS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("compressed-tensors NVFP4", ("weight_packed", "weight_global_scale")),
    ("compressed-tensors", ("weight_packed",)),
    ("NVFP4", ("weight_scale_2",)),
    ("NVFP4", ("weight_global_scale",)),
    ("GPTQ", ("qweight", "g_idx")),
    ("GPTQ or AWQ", ("qweight", "qzeros")),
    ("packed integers", ("qweight",)),
    ("bitsandbytes, 4 bits", ("weight.absmax",)),
    ("bitsandbytes, 8 bits", ("SCB",)),
    ("EETQ", ("weight_scales",)),
    ("HQQ", ("W_q",)),
    ("torchao", ("_weight_*",)),
    ("quanto", ("weight._data",)),
    ("AQLM", ("codes", "codebooks")),
    ("VPTQ", ("indices", "centroids.*")),
    ("MXFP4", ("blocks", "scales")),
    ("MXFP4", ("weight_blocks",)),
    ("HIGGS", ("tables", "scales")),
    ("MLX", ("scales",)),
    ("ExLlamaV2", ("q_weight",)),
    ("ExLlamaV3", ("trellis",)),
    ("QuIP#", ("Qidxs",)),
    ("Marlin", ("B", "s")),
)
_NAMED_BY_CONFIG = {"gptq": "GPTQ", "awq": "AWQ", "auto-round": "AutoRound", "auto_round": "AutoRound"}
_ADAPTERS = ("lora_*", "hada_*", "lokr_*", "oft_*", "boft_*", "ia3_*", "vera_*", "hra_*")

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
FLOAT8_SCALES = ("weight_scale_inv", "weight_scale", "scale")
"""The names of a float8 weight's scales, which are factors: DeepSeek-V3's, compressed-tensors' and ModelOpt's, and that
of DeepSeek's own files (weight_dequant in their inference/kernel.py: the "inverse" is a factor as well)."""
ALLOWED = "bfloat16, float16 or float32, or float8 with a weight_scale_inv or weight_scale"
_BLOCK = 128  # of DeepSeek-V3 and all formats derived from it


def format_of(leaves: Sequence[str], quant_method: object = None) -> tuple[str, str] | None:
    """The tensor by which a quantised format is recognised, and the format; None: a plain weight.

    Args:
        leaves: The names behind the gate's name, such as "qweight".
        quant_method: The `quant_method` of config.json, for formats that cannot be recognised by names alone.
    """
    for name, marks in _FORMATS:
        found = [[leaf for leaf in leaves if fnmatchcase(leaf, mark)] for mark in marks]
        if all(found):
            by_config = _NAMED_BY_CONFIG.get(str(quant_method)) if "qweight" in marks else None
            return found[0][0], by_config or name
    unknown = [leaf for leaf in leaves if leaf.rpartition(".")[2] not in ROLES and "bias" not in leaf]
    if "weight" in leaves or not unknown or adapters(leaves):
        return None
    return unknown[0], "a format that moegate does not know"


def adapters(leaves: Sequence[str]) -> list[str]:
    """The tensors among these that belong to adapters, which are not merged into the gate's weight."""
    return [leaf for leaf in leaves if any(fnmatchcase(leaf, pattern) for pattern in _ADAPTERS)]


def dequantised(weight: Tensor, scale: Tensor, names: tuple[str, str], block: tuple[int, int] | None) -> Tensor:
    """A float8 weight [R, C] multiplied by its scale, in float32.

    Args:
        weight: Of a dtype of `FLOAT8`.
        scale: One number, one for each row ([R] or [R, 1]), or one for each block.
        names: Of both, for errors.
        block: Rows and columns of a block; None: inferred from the shapes.

    Raises:
        ValueError: Another shape or dtype of the scale; MXFP8.
    """
    weight_name, scale_name = names
    rows, columns = weight.shape if weight.dim() == 2 else (0, 0)
    if not rows or not columns:
        raise ValueError(f"path: {weight_name} has shape {list(weight.shape)}; allowed for float8: two dimensions")
    if scale.dtype == torch.uint8 or _is_microscaled(scale, rows, columns):
        raise ValueError(f"path: {weight_name} is stored with {scale_name} (MXFP8); allowed: {ALLOWED}")
    if scale.dtype not in (*FLOATS, torch.float8_e8m0fnu):
        allowed = "float32, bfloat16, float16, float8_e8m0fnu"
        raise ValueError(f"path: {scale_name} has dtype {scale.dtype}; allowed: {allowed}")
    factors = scale.float()
    if scale.numel() == 1:
        return weight.float() * factors.reshape(1, 1)
    if scale.numel() == rows and len(scale) == rows:
        return weight.float() * factors.reshape(rows, 1)
    if block is None:
        block = _inferred_block((rows, columns), scale)
    if block is None or scale.shape != _blocks((rows, columns), block):
        by_block = f", or {list(_blocks((rows, columns), block))} for blocks of {list(block)}" if block else ""
        raise ValueError(
            f"path: {scale_name} has shape {list(scale.shape)} beside a weight {[rows, columns]}; "
            f"allowed: [1], [{rows}, 1]{by_block}"
        )
    spread = factors.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * spread


def block_size(stated: object) -> tuple[int, int] | None:
    """The rows and columns of an FP8 block, if a config states them."""
    if not isinstance(stated, (list, tuple)) or len(stated) != 2:
        return None
    rows, columns = stated
    return (rows, columns) if all(isinstance(size, int) and size > 0 for size in stated) else None


def _is_microscaled(scale: Tensor, rows: int, columns: int) -> bool:
    """True if each scale is a power of two for 32 columns, as in the OCP's MX formats."""
    is_fine = scale.dim() == 2 and scale.shape[0] == rows and 32 * scale.shape[1] == columns
    return is_fine and scale.dtype == torch.float8_e8m0fnu


def _blocks(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """The numbers of blocks in both dimensions; the last block of a row or column may be incomplete."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def _inferred_block(shape: tuple[int, int], scale: Tensor) -> tuple[int, int] | None:
    """128 x 128 if the number of scales fits, else the size of equal blocks without a remainder; None: neither fits."""
    if scale.dim() != 2:
        return None
    if tuple(scale.shape) == _blocks(shape, (_BLOCK, _BLOCK)):
        return _BLOCK, _BLOCK
    if not all(scale.shape) or shape[0] % scale.shape[0] or shape[1] % scale.shape[1]:
        return None
    return shape[0] // scale.shape[0], shape[1] // scale.shape[1]


def shaped(role: str, tensor: Tensor, name: str, take: str | None, spec: RouterSpec) -> Tensor:
    """A stored tensor in the shape and dtype for `Gate`, in memory of its own.

    A tensor as read is a view of the file: it would keep the file mapped, and change when the file changes.
    """
    wanted = next(each for each in inputs_of(spec) if each.name == role)
    shape = tuple(size if isinstance(size, int) else (*tensor.shape, 0)[0] for size in wanted.shape)
    tensor = _taken(tensor, name, take, shape)
    if [size for size in tensor.shape if size != 1] != [size for size in shape if size != 1]:
        hint = ", of which it is the transpose" if tensor.shape == shape[::-1] else ""
        raise ValueError(f"path: {name} has shape {list(tensor.shape)}; allowed by the spec: {list(shape)}{hint}")
    dtypes = INTEGERS if role == "tid2eid" else FLOATS
    if tensor.dtype not in dtypes:
        raise ValueError(f"path: {name} has dtype {tensor.dtype}; allowed: {', '.join(map(str, dtypes))}")
    if role == "e_score_correction_bias" or (role == "weight" and spec.weight_dtype == "float32"):
        tensor = tensor.to(torch.float32)
    return tensor.reshape(shape).clone(memory_format=torch.contiguous_format)


def _taken(tensor: Tensor, name: str, take: str | None, shape: tuple[int, ...]) -> Tensor:
    """A stored tensor, transformed by an entry's `take` (configs/types/README.md)."""
    if take is None:
        return tensor
    if tensor.dim() != 2 or len(tensor) == 0:
        raise ValueError(f"path: {name} has shape {list(tensor.shape)}; allowed: two dimensions, neither of them empty")
    if take == "first_row":
        return tensor[0]
    if take == "transpose":
        return tensor.T
    assert take == "by_shape", take
    if shape[0] == shape[1]:
        raise ValueError(f"path: {name} is square, and may be transposed or not; allowed: moegate.Gate(spec, weight)")
    return tensor.T if tensor.shape == shape[::-1] else tensor
