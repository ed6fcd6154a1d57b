"""select.cuh: logits, or the partial sums that they are made of, to experts and weights in one kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moegate.contract.limits import least_sum
from moegate.cuda import device as gpu
from moegate.cuda import jit, text
from moegate.halves import BoundGemm, Call, Logits, Selection
from moegate.problem import Problem
from moegate.routing import Routing, outputs_of
from moegate.spec import RouterSpec

ARGUMENTS = text.Arguments(
    "SelectArguments",
    logits="const void*",  # or the partial sums of which logits.cuh makes them
    correction_bias="const float*",
    per_expert_scale="const void*",
    global_scale="const void*",
    tid2eid="const void*",
    input_ids="const void*",
    bias="const void*",  # the linear one, of partial sums
    norm_factors="const float*",  # [M], of partial sums with an input norm
    made_logits="void*",  # of partial sums: [M, R], contiguous, like all outputs
    topk_ids="int32*",  # [M, k]
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
# Kernels, and the registers of a lane for partial sums in flight.
_OF_LOGITS = (("select_few", 0), ("select_many", 0))
_OF_PARTIAL_SUMS = (("select_few", 64), ("select_some", 64), ("select_many", 16))
# A token is a warp. Few are in blocks of two, up to so many in blocks of one; more are cheaper to start in larger ones.
_MOST_SPREAD = 1024


class Select(Selection):
    """Our kernel, for every spec and number of tokens."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return "select"

    def unsupported(self, problem: Problem, num_tokens: int) -> str | None:
        """Why it cannot run."""
        return gpu.unsupported(problem.machine)

    def bind(self, problem: Problem, device: torch.device, gemm: BoundGemm | None) -> BoundSelect:
        """The kernels of a problem."""
        return BoundSelect(problem, device, gemm)

    def sources(self, problem: Problem, chip: gpu.Chip) -> list[str]:
        """The text for a problem, on logits."""
        return [source(problem, aligned=reads_fours(problem.spec))]


SELECT = Select()


def source(problem: Problem, *, aligned: bool, num_terms: int = 0) -> str:
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
        "int kSharedWords": shared_words(spec),
    }
    types = {
        "Logits": problem.logits_dtype,
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


class _Kernels(NamedTuple):
    few: jit.Kernel
    some: jit.Kernel
    many: jit.Kernel


class BoundSelect:
    """The kernels for one problem, loaded for a device; others are when a call needs them."""

    def __init__(self, problem: Problem, device: torch.device, gemm: BoundGemm | None, arch: str | None = None) -> None:
        self._problem, self._device, self._arch = problem, device, arch
        ids, weights, logits, shared, identity = outputs_of(problem.spec)
        assert ids.columns is not None
        self._top_k, self._weights_dtype = ids.columns, weights.dtype
        self._logits = logits._replace(dtype=problem.logits_dtype)
        self._shared, self._identity = (each if each.is_there else None for each in (shared, identity))
        self._reads_fours = reads_fours(problem.spec)
        self._reads_four_logits = self._reads_fours and problem.spec.num_gate_rows % 4 == 0
        self._bytes_of_four = 4 * problem.logits_dtype.itemsize
        self._num_terms = 0 if gemm is None else gemm.num_terms
        self._holds_dependents_to = 0 if gemm is None else gemm.holds_dependents_to
        self._most_few = 2 * gpu.chip_of(device, arch).num_sms
        self._kernels: dict[tuple[bool, int], _Kernels] = {}
        for num_terms in {0, self._num_terms}:
            self._load(self._reads_fours, num_terms)

    def _load(self, aligned: bool, num_terms: int) -> _Kernels:
        """Compiles for a kind of source, once."""
        problem = self._problem
        module = jit.load(source(problem, aligned=aligned, num_terms=num_terms), self._device, self._arch)
        bytes_of_warp = 4 * shared_words(problem.spec)

        def in_blocks_of(warps: int, name: str, *, least_shared: bool = False) -> jit.Kernel:
            return module.kernel(
                name,
                ARGUMENTS.format,
                32 * warps,
                shared_bytes=bytes_of_warp * warps,
                least_shared=least_shared,
                pdl=problem.pdl,
            )

        # A multiprocessor must drain before its carve-out of shared memory changes. `select_few` asks for the smallest
        # carve-out, as most kernels in front do, and can start beside them. That leaves room for one block on each
        # multiprocessor, so that it serves at most 2 * num_sms tokens.
        kernels = self._kernels[aligned, num_terms] = _Kernels(
            in_blocks_of(2, "select_few", least_shared=True),
            in_blocks_of(1, "select_some" if num_terms else "select_many"),
            in_blocks_of(8, "select_many"),
        )
        return kernels

    def __call__(self, call: Call, logits: Logits) -> Routing:
        """The routing of M > 0 tokens, of logits [M, R] whose rows may be apart, or of partial sums."""
        num_tokens, _, _, tensors, input_ids, _, out, stream = call
        if out is None and isinstance(logits, Tensor):
            source, made, norm_factors, num_splits = logits, logits, None, 0
        else:
            source, made, norm_factors, num_splits = self._source_of(num_tokens, logits, out)
        bias, correction_bias, _, per_expert_scale, global_scale, table = tensors
        address, stride = made.data_ptr(), source.stride()[-2]
        bias_address = 0 if correction_bias is None else correction_bias.data_ptr()
        aligned = self._reads_fours and bias_address % 16 == 0
        if aligned and self._reads_four_logits:
            aligned = address % self._bytes_of_four == 0 and stride % 4 == 0
        variant = aligned, self._num_terms if num_splits else 0
        kernels = self._kernels.get(variant) or self._load(*variant)
        kernel, warps = kernels.few, 2
        if num_tokens > self._most_few:
            kernel, warps = (kernels.some, 1) if num_tokens <= _MOST_SPREAD else (kernels.many, 8)
        routing = self._outputs(num_tokens, made, out)
        ids, weights, _, shared_weights, identity_weight = routing
        kernel.launch(
            (-(-num_tokens // warps), 1),
            stream,
            source.data_ptr() if num_splits else address,
            bias_address,
            0 if per_expert_scale is None else per_expert_scale.data_ptr(),
            0 if global_scale is None else global_scale.data_ptr(),
            0 if table is None else table.data_ptr(),
            0 if input_ids is None else input_ids.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            0 if norm_factors is None else norm_factors.data_ptr(),
            address,
            ids.data_ptr(),
            weights.data_ptr(),
            0 if shared_weights is None else shared_weights.data_ptr(),
            0 if identity_weight is None else identity_weight.data_ptr(),
            stride,
            0 if table is None else table.stride(0),
            0 if table is None else table.shape[0],
            num_tokens,
            num_splits,
            num_tokens <= self._holds_dependents_to,
        )
        return routing

    def _source_of(
        self, num_tokens: int, logits: Logits, out: Routing | None
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """What is read, the logits as they are returned, norm factors, and num_splits (0: logits are read)."""
        place = None if out is None else out.logits
        if isinstance(logits, Tensor):
            made = logits if place is None or place is logits else place.copy_(logits)
            return made, made, None, 0
        made = gpu.empty(self._logits.shape(num_tokens), self._logits.dtype) if place is None else place
        return logits.sums, made, logits.norm_factors, logits.sums.shape[0]

    def _outputs(self, num_tokens: int, logits: Tensor, out: Routing | None) -> Routing:
        """The tensors to be filled: those of `out`, or new ones on the current device."""
        if out is not None:
            return out if out.logits is logits else out._replace(logits=logits)
        shared, identity = self._shared, self._identity
        return tuple.__new__(  # in half of the time of Routing(...)
            Routing,
            (
                gpu.empty((num_tokens, self._top_k), torch.int32),
                gpu.empty((num_tokens, self._top_k), self._weights_dtype),
                logits,
                None if shared is None else gpu.empty(shared.shape(num_tokens), shared.dtype),
                None if identity is None else gpu.empty(identity.shape(num_tokens), identity.dtype),
            ),
        )
