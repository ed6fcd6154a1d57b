"""The texts that NVRTC gets: one instantiation of a kernel each, with all that is constant as a constant."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moegate.backends.cuda.tiling import GemmPlan, parts
from moegate.contract.limits import least_sum
from moegate.spec import RouterSpec

_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "int32",
    torch.int64: "int64",
}
_SCORES = {
    "softmax": "kSoftmax",
    "sigmoid": "kSigmoid",
    "sqrtsoftplus": "kSqrtSoftplus",
    "identity": "kIdentity",
}


# Kernels, and the registers of a lane for products on their way.
_SELECTIONS = (("select_few", 0), ("select_many", 0))
_SELECTIONS_OF_PRODUCTS = (("select_few", 64), ("select_some", 64), ("select_many", 16))


class GemmDtypes(NamedTuple):
    """The dtypes of a router GEMM; None: there is no such tensor."""

    hidden: torch.dtype
    weight: torch.dtype
    bias: torch.dtype | None
    input_scale: torch.dtype | None
    logits: torch.dtype


class SelectDtypes(NamedTuple):
    """The dtypes of a selection; None: there is no such tensor."""

    logits: torch.dtype
    """Of those that it reads, or makes of products."""
    per_expert_scale: torch.dtype | None
    global_scale: torch.dtype | None
    tid2eid: torch.dtype | None
    input_ids: torch.dtype | None
    bias: torch.dtype | None = None
    """Of the linear bias that it adds to products."""


def gemm_source(
    hidden_size: int, rows: int, dtypes: GemmDtypes, norm_eps: float | None, plan: GemmPlan, *, frozen: bool
) -> str:
    """router_gemm.cuh for one weight: a kernel `gemm_T` for each T of plan.ahead."""
    hidden_parts, weight_parts, is_fp16 = parts(dtypes.hidden, dtypes.weight, norm_eps is not None)
    constants = {
        "int kHidden": hidden_size,
        "int kRows": rows,
        "int kSplit": plan.split,
        "int kWarps": plan.warps,
        "int kSteps": plan.steps,
        "int kHiddenParts": hidden_parts,
        "int kWeightParts": weight_parts,
        "bool kIsFp16": is_fp16,
        "bool kHasBias": dtypes.bias is not None,
        **_constants_of_norm(hidden_size, norm_eps),
        "bool kFrozen": frozen,
    }
    types = {
        "Hidden": dtypes.hidden,
        "Weight": dtypes.weight,
        "Bias": dtypes.bias or torch.float32,
        "InputScale": dtypes.input_scale or torch.float32,
        "Logits": dtypes.logits,
    }
    kernels = [
        f'extern "C" __global__ void __launch_bounds__({32 * plan.warps}, 1)\n'
        f"gemm_{tiles}(const __grid_constant__ GemmArguments arguments) "
        f"{{ router_gemm<Tiled<{tiles}, {ahead}>>(arguments); }}\n"
        for tiles, ahead in plan.ahead.items()
    ]
    return (
        '#include "router_gemm.cuh"\n'
        + _config(types, constants)
        + "template <int kTiles, int kStepsAhead>\nstruct Tiled : Config {\n"
        + "  static constexpr int kTokenTiles = kTiles, kAhead = kStepsAhead;\n};\n"
        + "".join(kernels)
    )


class InputNorm(NamedTuple):
    """The norm of hidden states before a product; see `RouterSpec.input_norm_eps`."""

    eps: float
    scale: torch.dtype
    """Of `input_scale`."""


def prepare_source(
    hidden_size: int,
    rows: int,
    hidden: torch.dtype,
    weight: torch.dtype,
    weight_parts: int,
    columns: int,
    norm: InputNorm | None,
) -> str:
    """products.cuh's `prepare_product` for one weight."""
    types = {"Hidden": hidden, "Weight": weight, "InputScale": torch.float32 if norm is None else norm.scale}
    constants = {
        "int kHidden": hidden_size,
        "int kRows": rows,
        "int kParts": weight_parts,
        "int kColumns": columns,
        **_constants_of_norm(hidden_size, None if norm is None else norm.eps),
    }
    return _around_product(types, constants, "prepare_product", "PrepareArguments")


def sum_source(rows: int, weight_parts: int, bias: torch.dtype | None, logits: torch.dtype) -> str:
    """products.cuh's `sum_products` for the products of one shape."""
    types = {"Bias": bias or torch.float32, "Logits": logits}
    constants: dict[str, object] = {"int kRows": rows, "int kParts": weight_parts, "bool kHasBias": bias is not None}
    return _around_product(types, constants, "sum_products", "SumArguments")


def _constants_of_norm(hidden_size: int, eps: float | None) -> dict[str, object]:
    return {"bool kNorm": eps is not None, "float kNormEps": eps or 0.0, "float kInputFactor": hidden_size**-0.5}


def _around_product(types: dict[str, torch.dtype], constants: dict[str, object], name: str, arguments: str) -> str:
    return (
        '#include "products.cuh"\n'
        + _config(types, constants)
        + 'extern "C" __global__ void __launch_bounds__(256)\n'
        + f"{name}(const __grid_constant__ {arguments} arguments) {{ {name}<Config>(arguments); }}\n"
    )


def select_source(spec: RouterSpec, dtypes: SelectDtypes, *, aligned: bool, frozen: bool, weight_parts: int = 0) -> str:
    """select.cuh for one spec. `aligned`: 4 logits or biases can be read at once, if E allows.

    `weight_parts`: it makes the logits of products, of a weight in so many parts, 1 to 3; 0: it is given the logits.

    Several kernels that are alike: the driver is told of each how it is to be run, and the more tokens there are, the
    fewer registers hold products on their way, so that more warps find a place.
    """
    constants = {
        **_constants_of(spec),
        "int kParts": weight_parts,
        "bool kNorm": weight_parts > 0 and spec.input_norm_eps is not None,
        "bool kHasBias": dtypes.bias is not None,
        "bool kAligned": aligned,
        "bool kFrozen": frozen,
    }
    types = {
        "Logits": dtypes.logits,
        "Weights": getattr(torch, spec.topk_weights_dtype),
        "ExpertScale": dtypes.per_expert_scale or torch.float32,
        "GlobalScale": dtypes.global_scale or torch.float32,
        "Table": dtypes.tid2eid or torch.int32,
        "InputIds": dtypes.input_ids or torch.int32,
        "Bias": dtypes.bias or torch.float32,
    }
    # Two blocks of 256: with registers for more, ptxas schedules a lane's experts one behind the other. One where a
    # lane holds products of more than 16 experts, or their keys twice, to sort them.
    holds_more = weight_parts > 0 or spec.num_group_score_keys > 2
    blocks = 1 if holds_more and spec.num_selectable > 32 * 16 else 2
    kernels = (
        f'extern "C" __global__ void __launch_bounds__(256, {blocks})\n'
        f"{name}(const __grid_constant__ SelectArguments arguments) {{ select<With<{registers}>>(arguments); }}\n"
        for name, registers in (_SELECTIONS if weight_parts == 0 else _SELECTIONS_OF_PRODUCTS)
    )
    return (
        '#include "select.cuh"\n'
        + _config(types, constants)
        + "template <int kRegisters>\nstruct With : Config {\n"
        + "  static constexpr int kInFlight = kRegisters;\n};\n"
        + "".join(kernels)
    )


def _constants_of(spec: RouterSpec) -> dict[str, object]:
    return {
        "int kExperts": spec.num_experts,
        "int kSelectable": spec.num_selectable,
        "int kRows": spec.num_gate_rows,
        "int kTopK": spec.top_k,
        "Score kScore": f"Score::{_SCORES[spec.scoring_func]}",
        "int kLogitKeys": 0,
        "int kTransformedKeys": 1,
        "int kScoreKeys": 2,
        "int kKeys": _keys(spec),
        "bool kHasCorrectionBias": spec.correction_bias is not None,
        "int kGroups": spec.n_group,
        "int kTopkGroup": spec.topk_group,
        "int kGroupScoreKeys": spec.num_group_score_keys,
        "int kPerGroup": spec.top_k // spec.n_group if spec.select_per_group else 0,
        "int kFromScore": 0,
        "int kSoftmaxOfSelected": 1,
        "int kSigmoidOfSelected": 2,
        "int kWeights": _weights(spec),
        "bool kRenormalize": spec.renormalize and not spec.softmax_over_selected,
        "float kEps": spec.renormalize_eps,
        "float kLeastSum": least_sum(spec),
        "float kFactor": spec.routed_scaling_factor,
        "float kLogitMultiplier": spec.logit_multiplier,
        "float kSoftcap": spec.logit_softcapping or 0.0,
        "bool kHasExpertScale": spec.per_expert_scale,
        "bool kHasGlobalScale": spec.global_scale,
        "bool kIsHash": spec.hash_routing,
    }


def _keys(spec: RouterSpec) -> int:
    if spec.selects_on_logits:
        return 0
    return 1 if spec.correction_bias == "logit" else 2


def _weights(spec: RouterSpec) -> int:
    if spec.softmax_over_selected:
        return 1
    return 2 if spec.weights_from == "sigmoid_of_selected" else 0


def _config(types: dict[str, torch.dtype], constants: dict[str, object]) -> str:
    lines = [f"  using {name} = {_TYPES[dtype]};\n" for name, dtype in types.items()]
    lines += [f"  static constexpr {name} = {_literal(value)};\n" for name, value in constants.items()]
    return "struct Config {\n" + "".join(lines) + "};\n"


def _literal(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"float({value.hex()})"  # to the bit, rounded once
    return str(value)
