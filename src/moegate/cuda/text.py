"""The texts that NVRTC gets: a header with all that is constant as a constant, and the kernels made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch

CType = Literal["const void*", "const float*", "void*", "float*", "int64", "int32"]

_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "int32",
    torch.int64: "int64",
}


class Arguments:
    """The one by-value parameter of a kernel, declared here for the C struct and for the packing of a launch.

    Args:
        name: The struct's.
        fields: The C type of each field, in the order in which a launch gives their values.
    """

    def __init__(self, name: str, **fields: CType) -> None:
        self.name, self.fields = name, fields
        codes = ("P" if "*" in kind else "q" if kind == "int64" else "i" for kind in fields.values())
        self.format = "".join(codes) + "0q"
        """In the codes of Python's `struct`, with the padding at the end."""

    def __str__(self) -> str:
        """The struct's definition."""
        lines = "".join(f"  {kind} {name};\n" for name, kind in self.fields.items())
        return f"struct {self.name} {{\n{lines}}};\n"


def translation_unit(header: str, arguments: Iterable[Arguments], config: str, *kernels: str) -> str:
    """The whole text: the arguments of every kernel in the header, the header, the constants, the kernels."""
    structs = "".join(map(str, arguments))
    return f'#include "device.cuh"\n{structs}#include "{header}"\n{config}{"".join(kernels)}'


def config(types: Mapping[str, torch.dtype], constants: Mapping[str, object]) -> str:
    """`struct Config`: types by name, and constants by type and name, as in {"int kRows": 256}."""
    lines = [f"  using {name} = {_TYPES[dtype]};\n" for name, dtype in types.items()]
    lines += [f"  static constexpr {name} = {_literal(value)};\n" for name, value in constants.items()]
    return "struct Config {\n" + "".join(lines) + "};\n"


def kernel(name: str, call: str, arguments: Arguments, threads: int, blocks: int | None = None) -> str:
    """A kernel that hands its arguments to `call`; `blocks` of so many threads are to fit a multiprocessor at once."""
    bounds = str(threads) if blocks is None else f"{threads}, {blocks}"
    return (
        f'extern "C" __global__ void __launch_bounds__({bounds})\n'
        f"{name}(const __grid_constant__ {arguments.name} arguments) {{ {call}(arguments); }}\n"
    )


def norm_constants(hidden_size: int, eps: float | None) -> dict[str, object]:
    """Of an input norm (`RouterSpec.input_norm_eps`), for `norm_factor` of operands.cuh."""
    return {"bool kNorm": eps is not None, "float kNormEps": eps or 0.0, "float kInputFactor": hidden_size**-0.5}


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"float({value.hex()})"  # to the bit, rounded once
    return str(value)
