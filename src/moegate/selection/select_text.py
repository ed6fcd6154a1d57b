"""The text of select.cuh for one problem: all that the spec decides as a constant."""

from __future__ import annotations

import torch

from moegate.contract.limits import least_sum
from moegate.cuda import text
from moegate.problem import Problem
from moegate.spec import RouterSpec

ARGUMENTS = text.Arguments(
    "SelectArguments",
    logits="const void*",  # or the partial sums of which logits.cuh makes them
    correction_bias="const float*",
    per_expert_scale="const void*",
    global_scale="const void*",
    tid2eid="const void*",
    input_ids="const void*",
    padding="const void*",  # a mask [M], or the number of rows that are a token's
    bias="const void*",  # the linear one, of partial sums
    norm_factors="const float*",  # [M], of partial sums with an input norm
    made_logits="void*",  # of partial sums: [M, R], contiguous, like all outputs
    topk_ids="void*",  # [M, k]
    topk_weights="void*",
    shared_weights="void*",
    identity_weight="void*",
    logits_stride="int64",  # elements from row to row; partial sums are contiguous
    table_stride="int64",
    table_rows="int64",
    num_tokens="int32",
    num_splits="int32",  # of partial sums
    holds_dependents="int32",  # they start only when the wait is over
)
_SCORES = {
    "softmax": "kSoftmax",
    "sigmoid": "kSigmoid",
    "sqrtsoftplus": "kSqrtSoftplus",
    "identity": "kIdentity",
}
_PADDING = {None: 0, torch.bool: 1, torch.int32: 2}
# Kernels, and the registers of a lane for partial sums in flight.
_OF_LOGITS = (("select_few", 0), ("select_many", 0))
_OF_PARTIAL_SUMS = (("select_few", 64), ("select_some", 64), ("select_many", 16))


def select_text(problem: Problem, *, aligned: bool, num_terms: int = 0) -> str:
    """select.cuh for one problem. `aligned`: four logits or biases can be read at once.

    `num_terms`: it makes the logits of partial sums, of a weight in so many terms, 1 to 3; 0: it is given the logits.

    Several kernels that are alike: the driver is told of each how it is to be run. The more tokens there are, the fewer
    registers hold partial sums in flight, so that more warps find a place.
    """
    spec, dtypes = problem.spec, problem.dtypes
    constants = {
        **_constants_of(spec),
        "int kNumTerms": num_terms,
        "bool kNorm": num_terms > 0 and spec.input_norm_eps is not None,
        "bool kHasBias": num_terms > 0 and dtypes.bias is not None,
        "bool kAligned": aligned,
        "bool kFrozen": problem.frozen,
        "int kPadding": _PADDING[dtypes.padding],
        "int kSharedWords": shared_words(spec),
    }
    types = {
        "Logits": problem.logits_dtype,
        "Ids": getattr(torch, spec.topk_ids_dtype),
        "Weights": getattr(torch, spec.topk_weights_dtype),
        "ExpertScale": dtypes.per_expert_scale or torch.float32,
        "GlobalScale": dtypes.global_scale or torch.float32,
        "Table": dtypes.tid2eid or torch.int32,
        "InputIds": dtypes.input_ids or torch.int32,
        "Bias": (dtypes.bias if num_terms > 0 else None) or torch.float32,
    }
    # Two blocks of 256: with registers for more, ptxas schedules a lane's experts one behind the other. One where a
    # lane holds partial sums of more than 16 experts, or their keys twice, to sort them.
    holds_more = num_terms > 0 or spec.num_group_score_keys > 2
    blocks = 1 if holds_more and spec.num_selectable > 32 * 16 else 2
    with_registers = (
        "template <int kRegisters>\nstruct With : Config {\n  static constexpr int kInFlight = kRegisters;\n};\n"
    )
    kernels = [
        text.kernel(name, f"select<With<{registers}>>", ARGUMENTS, 256, blocks)
        for name, registers in (_OF_LOGITS if num_terms == 0 else _OF_PARTIAL_SUMS)
    ]
    return text.translation_unit("select.cuh", [ARGUMENTS], text.config(types, constants) + with_registers, *kernels)


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
        "int kMask": 1,
        "int kCount": 2,
    }


def _keys(spec: RouterSpec) -> int:
    if spec.selects_on_logits:
        return 0
    return 1 if spec.correction_bias == "logit" else 2


def _weights(spec: RouterSpec) -> int:
    if spec.softmax_over_selected:
        return 1
    return 2 if spec.weights_from == "sigmoid_of_selected" else 0


def shared_words(spec: RouterSpec) -> int:
    """A warp's shared memory, in words of 4 bytes, for what select.cuh lays out there; a multiple of 4."""
    experts, groups = spec.num_selectable, spec.n_group
    groups_are_lanes = 32 % groups == 0 and experts % 32 == 0
    words = -(-experts // 4) * 4 + spec.top_k
    if spec.select_per_group:
        words = -(-words // 2) * 2 + 2 * spec.top_k + (0 if groups_are_lanes else experts)
    elif groups > 1 and not groups_are_lanes:
        words += experts + groups
    return -(-words // 4) * 4


def reads_fours(spec: RouterSpec) -> bool:
    """True if a lane reads four biases at once, where they are aligned; and four logits, if R is a multiple of 4."""
    return spec.num_selectable % 4 == 0 and -(-spec.num_selectable // 32) % 4 == 0
