"""docs/contract.md, section 5: wrong arguments, and the errors that users get."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import on_device
import pytest
import torch
from on_device import DEVICE, all_there, back, gate_there, there
from routers import SPECS, random_logits, route_arguments, select_arguments, tensors_of

import moegate
from moegate import RouterSpec
from moegate.contract.verify import verify_logits, verify_routing
from moegate.routing import RouterTensors

SPEC = RouterSpec(16, 8, 2, "sigmoid", "score", renormalize=True)
HIDDEN, WEIGHT, BIAS = torch.randn(3, 16), torch.randn(8, 16), torch.zeros(8)
LOGITS = torch.randn(3, 8)
HASH = RouterSpec(16, 8, 2, "sigmoid", hash_routing=True)
TABLE = torch.tensor([[0, 1], [2, 3]])
IDS = torch.tensor([0, 1, 0])


def gemm(**changed: Any) -> object:
    given: dict[str, Any] = {"hidden": HIDDEN, "weight": WEIGHT, "bias": None, "out_dtype": torch.float32, **changed}
    given = all_there(given)
    return moegate.router_gemm(given.pop("hidden"), given.pop("weight"), given.pop("bias"), **given)


def select(**changed: Any) -> object:
    given: dict[str, Any] = {"logits": LOGITS, "spec": SPEC, "e_score_correction_bias": BIAS, **changed}
    given = all_there(given)
    return moegate.select(given.pop("logits"), given.pop("spec"), **given)


def select_by_hash(**changed: Any) -> object:
    return select(**{"spec": HASH, "e_score_correction_bias": None, "tid2eid": TABLE, "input_ids": IDS, **changed})


def route(**changed: Any) -> object:
    given: dict[str, Any] = {
        "hidden": HIDDEN,
        "weight": WEIGHT,
        "spec": SPEC,
        "e_score_correction_bias": BIAS,
        **changed,
    }
    given = all_there(given)
    return moegate.route(given.pop("hidden"), given.pop("weight"), given.pop("spec"), **given)


def gate(**changed: Any) -> moegate.Gate:
    given: dict[str, Any] = {"weight": WEIGHT, "spec": SPEC, "e_score_correction_bias": BIAS, **changed}
    given = all_there(given)
    return moegate.Gate(given.pop("spec"), given.pop("weight"), **given)


def gate_by_hash(**changed: Any) -> object:
    made = gate(**{"spec": HASH, "e_score_correction_bias": None, "tid2eid": TABLE, **changed})
    made.refresh()  # checks the table, which may be a placeholder before
    return made


def call_gate(**changed: Any) -> object:
    hidden = there(changed.pop("hidden", HIDDEN))
    return gate_there(SPEC, WEIGHT, e_score_correction_bias=BIAS)(hidden, **all_there(changed))


Case = tuple[Callable[..., object], dict[str, Any], type[Exception], str]
CASES: list[Case] = [
    (gemm, {"hidden": [[1.0]]}, TypeError, "hidden: got list; allowed: a torch.Tensor"),
    (gemm, {"hidden": HIDDEN.double()}, TypeError, "hidden: got dtype float64; allowed: float32, bfloat16, float16"),
    (gemm, {"hidden": HIDDEN[0]}, ValueError, r"hidden: got shape \[16\]; allowed: \[M, K\]"),
    (gemm, {"weight": WEIGHT[:, :8]}, ValueError, r"weight: got shape \[8, 8\]; allowed: \[N, 16\]"),
    (gemm, {"weight": torch.randn(1025, 16)}, ValueError, "weight: got 1025 rows; allowed: 1 to 1024"),
    (gemm, {"weight": torch.randn(0, 16)}, ValueError, "weight: got 0 rows; allowed: 1 to 1024"),
    (gemm, {"hidden": HIDDEN[:, :0], "weight": WEIGHT[:, :0]}, ValueError, "allowed: a K of at least 1"),
    (gemm, {"weight": WEIGHT.to("meta")}, ValueError, f"weight: got device meta; allowed: {DEVICE}"),
    (gemm, {"weight": torch.randn(16, 8).T}, ValueError, r"weight: got strides \[1, 8\]; allowed: 1 in the last"),
    (gemm, {"weight": WEIGHT.to_sparse()}, ValueError, "weight: got layout torch.sparse_coo; allowed: torch.strided"),
    (gemm, {"bias": torch.zeros(7)}, ValueError, r"bias: got shape \[7\]; allowed: \[8\]"),
    (gemm, {"out_dtype": torch.float16}, ValueError, "out_dtype: got torch.float16; allowed: float32, bfloat16"),
    (select, {"logits": LOGITS.half()}, TypeError, "logits: got dtype float16; allowed: float32, bfloat16"),
    (select, {"logits": LOGITS[:, :7]}, ValueError, r"logits: got shape \[3, 7\]; allowed: \[M, 8\]"),
    (select, {"logits": LOGITS.T.contiguous().T}, ValueError, r"logits: got strides \[1, 3\]; allowed: 1"),
    (select, {"e_score_correction_bias": None}, ValueError, "e_score_correction_bias: got None; allowed: a tensor"),
    (
        select,
        {"e_score_correction_bias": BIAS[:7]},
        ValueError,
        r"e_score_correction_bias: got shape \[7\]; allowed: \[8\]",
    ),
    (select, {"e_score_correction_bias": BIAS.bfloat16()}, TypeError, "got dtype bfloat16; allowed: float32"),
    (select, {"e_score_correction_bias": BIAS.to("meta")}, ValueError, f"got device meta; allowed: {DEVICE}"),
    (select, {"per_expert_scale": BIAS}, ValueError, "per_expert_scale: got a tensor; allowed: None"),
    (select, {"input_ids": IDS}, ValueError, "input_ids: got a tensor; allowed: None"),
    (select_by_hash, {"input_ids": None}, ValueError, r"input_ids: got None; allowed: a tensor \[3\]"),
    (select_by_hash, {"input_ids": IDS[:2]}, ValueError, r"input_ids: got shape \[2\]; allowed: \[3\]"),
    (select_by_hash, {"input_ids": IDS.float()}, TypeError, "input_ids: got dtype float32; allowed: int32, int64"),
    (route, {"hidden": HIDDEN[:, :8]}, ValueError, r"hidden: got shape \[3, 8\]; allowed: \[M, 16\]"),
    (route, {"weight": WEIGHT[:7]}, ValueError, r"weight: got shape \[7, 16\]; allowed: \[8, 16\]"),
    (route, {"bias": BIAS}, ValueError, "bias: got a tensor; allowed: None, for the spec's linear_bias = False"),
    (route, {"hidden": HIDDEN.to("meta")}, ValueError, f"hidden: got device meta; allowed: {DEVICE}"),
    (select, {"spec": "deepseek-v3"}, TypeError, "spec: got str; allowed: a moegate.RouterSpec"),
    (route, {"spec": None}, TypeError, "spec: got NoneType; allowed: a moegate.RouterSpec"),
    (gate, {"spec": WEIGHT, "weight": SPEC}, TypeError, "spec: got Tensor; allowed: a moegate.RouterSpec"),
    (select_by_hash, {"tid2eid": TABLE[:0]}, ValueError, "tid2eid: got no rows"),
    (gate_by_hash, {"tid2eid": None}, ValueError, r"tid2eid: got None; allowed: a tensor \[V, 2\], for the spec's"),
    (gate, {"backend": ["torch"]}, ValueError, r"backend: got \['torch'\]; allowed: None, 'cuda', 'torch'"),
    (gate, {"policy": ["sglang"]}, ValueError, r"policy: got \['sglang'\]; allowed: 'measured', 'sglang'"),
    (gate, {"weight": WEIGHT.int()}, TypeError, "weight: got dtype int32"),
    (gate, {"e_score_correction_bias": BIAS.double()}, TypeError, "e_score_correction_bias: got dtype float64"),
    (gate, {"input_scale": torch.ones(16)}, ValueError, "input_scale: got a tensor; allowed: None"),
    (gate_by_hash, {"tid2eid": TABLE + 5}, ValueError, "tid2eid: got expert 8"),
    (gate_by_hash, {"tid2eid": TABLE[:, :1]}, ValueError, r"tid2eid: got shape \[2, 1\]; allowed: \[V, 2\]"),
    (call_gate, {"hidden": HIDDEN[0]}, ValueError, r"hidden: got shape \[16\]; allowed: \[M, 16\]"),
    (call_gate, {"input_ids": IDS}, ValueError, "input_ids: got a tensor; allowed: None"),
]
# Errors about values, which are checked on a CPU only: on a GPU, the check would need a synchronization.
CASES_OF_VALUES: list[Case] = [
    (select_by_hash, {"input_ids": IDS - 1}, ValueError, "input_ids: got -1; allowed: 0 to 1"),
    (select_by_hash, {"input_ids": IDS + 1}, ValueError, "input_ids: got 2; allowed: 0 to 1"),
    (select_by_hash, {"tid2eid": TABLE + 5}, ValueError, "tid2eid: got expert 8; allowed: 0 to 7"),
    (select_by_hash, {"tid2eid": TABLE * 0}, ValueError, r"tid2eid: got \[0, 0\] in a row; allowed: distinct"),
]
ALL_CASES = [*CASES, *(pytest.param(*case, marks=pytest.mark.cpu) for case in CASES_OF_VALUES)]


@pytest.mark.parametrize(
    ("call", "changed", "error", "message"), ALL_CASES, ids=lambda part: getattr(part, "__name__", "")
)
def test_errors_name_the_argument(
    call: Callable[..., object], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    call()
    with pytest.raises(error, match=message):
        call(**changed)


def test_a_pinned_weight_is_not_taken_in_half_precision() -> None:
    spec = SPECS["softmax with bias and floor"]
    weight = torch.randn(spec.num_gate_rows, 64).bfloat16()
    with pytest.raises(TypeError, match="weight: got dtype bfloat16; allowed: float32"):
        moegate.Gate(spec, weight, e_score_correction_bias=torch.zeros(spec.num_selectable))


@pytest.mark.parametrize("name", SPECS)
def test_no_tokens(name: str) -> None:
    spec = SPECS[name]
    tensors = tensors_of(spec)
    hidden, weight = torch.zeros(0, spec.hidden_size), torch.randn(spec.num_gate_rows, spec.hidden_size)
    for frozen in (False, True):
        arguments = route_arguments(spec, tensors, 0)
        input_ids = arguments.pop("input_ids", None)
        gate = gate_there(spec, weight, **arguments, frozen=frozen)
        routing = back(gate(there(hidden), input_ids=there(input_ids), return_logits=True))
        assert routing.topk_ids.shape == routing.topk_weights.shape == (0, spec.top_k)
        assert routing.topk_ids.dtype == getattr(torch, spec.topk_ids_dtype)
        assert routing.logits is not None
        assert routing.logits.shape == (0, spec.num_gate_rows)
        assert verify_routing(routing, routing.logits, spec, tensors, input_ids=input_ids).problems == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_may_be_apart(dtype: torch.dtype) -> None:
    spec = SPECS["sigmoid with bias"]
    tensors = tensors_of(spec)
    wide_hidden = torch.full((40, 3 * 64), torch.nan, dtype=dtype)
    wide_weight = torch.full((spec.num_gate_rows, 100), torch.nan, dtype=dtype)
    wide_hidden[:, 64:128], wide_weight[:, :64] = torch.randn(40, 64), torch.randn(spec.num_gate_rows, 64)
    hidden, weight = wide_hidden[:, 64:128], wide_weight[:, :64]
    for frozen in (False, True):
        gate = gate_there(spec, weight, e_score_correction_bias=tensors.e_score_correction_bias, frozen=frozen)
        routing = back(gate(there(hidden), return_logits=True))
        assert routing.logits is not None
        assert verify_logits(routing.logits, hidden, weight, spec, RouterTensors()).problems == []
        assert verify_routing(routing, routing.logits, spec, tensors).problems == []
    logits = torch.full((40, 300), torch.nan)
    logits[:, : spec.num_gate_rows] = random_logits(spec, 40)
    part = logits[:, : spec.num_gate_rows]
    apart = on_device.select(part, spec, **select_arguments(spec, tensors, 40))
    together = on_device.select(part.contiguous(), spec, **select_arguments(spec, tensors, 40))
    assert apart.topk_ids.equal(together.topk_ids)


def test_no_gradient() -> None:
    hidden = there(HIDDEN).clone().requires_grad_()
    weight, bias = torch.nn.Parameter(there(WEIGHT)), there(BIAS)
    assert not moegate.router_gemm(hidden, weight).requires_grad
    assert not moegate.route(hidden, weight, SPEC, e_score_correction_bias=bias).topk_weights.requires_grad
    assert not moegate.Gate(SPEC, weight, e_score_correction_bias=bias)(hidden).topk_weights.requires_grad
    assert weight.requires_grad
