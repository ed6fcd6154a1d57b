"""What FlashInfer's functions take, from its releases: nothing of FlashInfer is imported for it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from packaging.version import InvalidVersion, Version

from moegate.spec import RouterSpec

PACKAGE = "flashinfer-python"
MAX_TOKENS = 16
"""Of its router GEMMs."""
_GET = f"`pip install -U {PACKAGE}`"
_PRECOMPILED = "flashinfer_jit_cache"


@dataclass(frozen=True)
class Function:
    """One function of FlashInfer's public API."""

    name: str
    module: str
    since: Mapping[int, str]
    """By compute capability, as in sm_103: the first release that we know to have it for that chip."""

    def __hash__(self) -> int:
        return hash(self.name)


def _gemm(name: str, since: Mapping[int, str]) -> Function:
    return Function(name, "flashinfer.gemm", since)


_AT_ONCE = {90: "0.7.0", 100: "0.7.0", 103: "0.7.0", 107: "0.7.0"}
GEMMS = {
    (7168, 256): _gemm("mm_M1_16_K7168_N256", {90: "0.7.0", 100: "0.5.3", 103: "0.6.8", 107: "0.6.18"}),
    (6144, 256): _gemm("mm_M1_16_K6144_N256", {90: "0.7.0", 100: "0.6.14", 103: "0.6.14", 107: "0.6.18"}),
    (7168, 384): _gemm("mm_M1_16_K7168_N384", _AT_ONCE),
    (7168, 896): _gemm("mm_M1_16_K7168_N896", _AT_ONCE),
}
"""By (K, N): the router GEMMs with float32 logits."""
TINYGEMM = _gemm("tinygemm_bf16", {**dict.fromkeys((90, 100, 103, 110, 120, 121), "0.6.7"), 107: "0.6.18"})
TOP_K = Function(
    "fused_topk_deepseek",
    "flashinfer.fused_moe",
    {**dict.fromkeys((89, 90, 100, 103, 120, 121), "0.6.0"), 107: "0.6.18"},
)


# What a function takes of a spec is written as what it knows: a field that is not named here must be at its default.
_SIZES = {"hidden_size", "num_experts", "num_zero_experts", "num_shared_gates", "weight_dtype", "logits_dtype"}
_OF_SELECTION = {
    *(
        "top_k",
        "scoring_func",
        "correction_bias",
        "weights_from",
        "topk_ids_dtype",
        "topk_weights_dtype",
        "hash_routing",
    ),
    *("n_group", "topk_group", "group_score", "group_score_top_j", "select_per_group"),
    *("renormalize", "renormalize_eps", "renormalize_floor", "routed_scaling_factor", "global_scale"),
    *("logit_multiplier", "logit_softcapping", "per_expert_scale"),
}
_TOP_K_WANTS = {"scoring_func": "sigmoid", "correction_bias": "score", "renormalize": True}
_TOP_K_TAKES = {
    *("hidden_size", "linear_bias", "weight_dtype", "input_norm_eps"),  # of the GEMM in front
    *("num_experts", "top_k", "n_group", "topk_group", "renormalize_eps", "routed_scaling_factor"),  # its arguments
    *("group_score", "group_score_top_j", "topk_ids_dtype"),  # looked at below
}


@cache
def installed_version() -> str | None:
    """The version of the installed FlashInfer, by its metadata; None: there is none."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def cannot_compile() -> str | None:
    """None, or why FlashInfer cannot compile its kernels here; it looks for nvcc in the same places."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home, "bin", "nvcc")] if home else [Path("/usr/local/cuda/bin/nvcc")]
    named = os.environ.get("FLASHINFER_NVCC")
    places = [Path(named)] if named else places
    on_path = not named and not home and shutil.which("nvcc") is not None
    if on_path or any(place.exists() for place in places) or importlib.util.find_spec(_PRECOMPILED) is not None:
        return None
    return (
        f"FlashInfer compiles its kernels and finds no nvcc ({places[0]}); install the CUDA toolkit, "
        "or flashinfer-jit-cache, which has them compiled"
    )


def missing(function: Function, capability: tuple[int, int], version: str | None) -> str | None:
    """None, or why no FlashInfer of this version has the function for such a chip."""
    number = 10 * capability[0] + capability[1]
    first = function.since.get(number)
    if first is None:
        return f"FlashInfer has no {function.name} for sm_{number}"
    if version is None:
        return f"FlashInfer is not installed: {_GET}"
    try:
        is_old = Version(version) < Version(first)
    except InvalidVersion:
        return f"FlashInfer's version {version!r} is none that can be compared"
    if is_old:
        return f"FlashInfer {version} is too old, {function.name} for sm_{number} needs {first}: {_GET}"
    return None


def _unknown(spec: RouterSpec, known: set[str]) -> list[str]:
    """The fields that are not at their default, less those that are known."""
    others = [part for part in dataclasses.fields(spec) if part.name not in known]
    return [part.name for part in others if getattr(spec, part.name) != part.default]


def gemm_refuses(spec: RouterSpec, weight_dtype: torch.dtype) -> str | None:
    """None, or why the spec's logits are none that FlashInfer's router GEMMs compute for some M."""
    if (spec.hidden_size, spec.num_gate_rows) not in GEMMS:
        shapes = ", ".join(f"{k} x {n}" for k, n in GEMMS)
        return f"K x N = {spec.hidden_size} x {spec.num_gate_rows}; its router GEMMs take {shapes}"
    if spec.input_norm_eps is not None or spec.linear_bias:
        return "its router GEMMs have no norm and no bias"
    if _unknown(spec, {"input_norm_eps", "linear_bias"} | _SIZES | _OF_SELECTION):
        return f"its router GEMMs know no {', '.join(_unknown(spec, _SIZES | _OF_SELECTION))}"
    if spec.logits_dtype != "float32":
        return f"{spec.logits_dtype} logits; its router GEMMs write float32"
    return _only_bfloat16("weight", weight_dtype)


def tinygemm_refuses(spec: RouterSpec, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None) -> str | None:
    """None, or why `tinygemm_bf16` does not compute the spec's logits."""
    if spec.logits_dtype != "bfloat16":
        return f"{spec.logits_dtype} logits; {TINYGEMM.name} writes bfloat16"
    if spec.input_norm_eps is not None:
        return f"{TINYGEMM.name} has no norm"
    if _unknown(spec, {"linear_bias"} | _SIZES | _OF_SELECTION):
        return f"{TINYGEMM.name} knows no {', '.join(_unknown(spec, {'linear_bias'} | _SIZES | _OF_SELECTION))}"
    if spec.hidden_size % 64 or spec.num_gate_rows % 16:
        return f"K x N = {spec.hidden_size} x {spec.num_gate_rows}; {TINYGEMM.name} takes multiples of 64 and 16"
    return _only_bfloat16("weight", weight_dtype) or (
        None if bias_dtype is None else _only_bfloat16("bias", bias_dtype)
    )


def dtype_refuses(hidden_dtype: torch.dtype) -> str | None:
    """None, or why hidden states of this dtype cannot be given to FlashInfer's GEMMs."""
    return _only_bfloat16("hidden", hidden_dtype)


def _only_bfloat16(name: str, dtype: torch.dtype) -> str | None:
    if dtype == torch.bfloat16:
        return None
    return f"{name} in {str(dtype).removeprefix('torch.')}; FlashInfer's products take bfloat16"


def top_k_refuses(spec: RouterSpec) -> str | None:
    """None, or why `fused_topk_deepseek` does not compute this router (the contract's ties and NaN apart)."""
    is_wanted = all(getattr(spec, name) == value for name, value in _TOP_K_WANTS.items())
    if not is_wanted or _unknown(spec, _TOP_K_TAKES | _TOP_K_WANTS.keys()):
        return f"not the router of {TOP_K.name}, which is sigmoid with a bias on the score, renormalised"
    if spec.topk_ids_dtype != "int32":
        return f"{spec.topk_ids_dtype} ids; {TOP_K.name} writes int32"
    per_group = spec.num_experts // spec.n_group
    small = per_group <= 32 and per_group * spec.topk_group <= 128 and spec.num_experts <= 256 and spec.n_group <= 32
    if spec.n_group == 1:
        small = spec.num_experts <= 384
    elif spec.group_score != "top2_sum":
        return f"{TOP_K.name} ranks groups by the sum of two"
    if not small or spec.top_k > 8:
        return f"too many experts, groups or choices for {TOP_K.name}"
    return None
