"""Prints docs/tensors.md from the tables that the code reads: `python tools/tensors_page.py > docs/tensors.md`."""

from __future__ import annotations

import dataclasses

from moegate import RouterSpec
from moegate.problem import short
from moegate.routing import Input, inputs_of, outputs_of

# Every size another number, so that a number says which size it is.
_EVERY = RouterSpec(
    61,
    40,
    5,
    "sigmoid",
    "score",
    renormalize=True,
    linear_bias=True,
    num_zero_experts=3,
    num_shared_gates=2,
    global_scale=True,
    input_norm_eps=1e-6,
)
# What cannot be together with all of that.
_OTHERS = (RouterSpec(61, 40, 5, hash_routing=True), RouterSpec(61, 40, 5, per_expert_scale=True))
_SIZES = {
    _EVERY.hidden_size: "K",
    _EVERY.num_experts: "N",
    _EVERY.num_selectable: "E",
    _EVERY.num_gate_rows: "R",
    _EVERY.top_k: "k",
    _EVERY.num_shared_gates: "num_shared_gates",
}

_HEAD = """
# The tensors of a router

Written by `python tools/tensors_page.py` from `inputs_of` and `outputs_of` of src/moegate/routing.py. The checks of
arguments, the operators' fakes, the outputs of the kernels and the reader of checkpoints read the same two tables.

M counts tokens, K is `hidden_size`, k is `top_k`, N is `num_experts`. E = N + `num_zero_experts` counts the experts
that can be chosen. R = E + `num_shared_gates` counts the rows of the weight: experts, zero experts, shared gates. V is
the size of the vocabulary.

## In

| tensor | when | shape | dtype | read by |
|---|---|---|---|---|
| `hidden` | always | [M, K] | float32, bfloat16, float16 | the GEMM |
"""


def page() -> str:
    """The page."""
    lines = [_HEAD.strip()]
    for rows in zip(*map(inputs_of, (_EVERY, *_OTHERS)), strict=True):
        wanted = next(each for each in rows if each.is_needed)
        half = "the GEMM" if wanted.half == "gemm" else "the selection"
        lines.append(f"| `{wanted.name}` | {_when(wanted)} | {_shape(wanted.shape)} | {_dtypes(wanted)} | {half} |")
    lines.append("| `input_ids` | `hash_routing=True` | [M] | int32, int64 | the selection |")
    lines.append("| `padding` | where a call brings it | [M], or [1] or [] | bool, or int32 | the selection |")
    lines += ["", "## Out", "", "| tensor | when | shape | dtype |", "|---|---|---|---|"]
    for output in outputs_of(_EVERY):
        shape = "[M]" if output.columns is None else f"[M, {_SIZES[output.columns]}]"
        when = "always" if output.field is None else f"`{output.field}` > 0"
        lines.append(f"| `{output.name}` | {when} | {shape} | `{_field_of_dtype(output.name)}` |")
    lines += ["", "`logits` are returned where they are asked for: `return_logits=True`."]
    return "\n".join(lines)


def _when(wanted: Input) -> str:
    if wanted.name == "weight":
        return 'always; `weight_dtype="float32"` allows float32 alone'
    default = next(part.default for part in dataclasses.fields(RouterSpec) if part.name == wanted.field)
    return f"`{wanted.field}` is not None" if default is None else f"`{wanted.field}=True`"


def _shape(shape: tuple[int | str, ...]) -> str:
    return f"[{', '.join(size if isinstance(size, str) else _SIZES.get(size, str(size)) for size in shape)}]"


def _dtypes(wanted: Input) -> str:
    return ", ".join(map(short, wanted.dtypes))


def _field_of_dtype(name: str) -> str:
    return {"topk_ids": "topk_ids_dtype", "logits": "logits_dtype"}.get(name, "topk_weights_dtype")


if __name__ == "__main__":
    print(page())
