"""What launches hand to kernels, by the names of the fields, without a GPU: every address where its name is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_kernels import a_problem
from routers import SPECS, generator, tensors_of, token_ids
from torch import Tensor

from moegate import RouterSpec, Routing
from moegate.cuda import device as gpu
from moegate.cuda import jit, text
from moegate.cuda.device import Chip
from moegate.gemm import cublas, router_gemm
from moegate.halves import Call, PartialSums
from moegate.problem import Problem, dtypes_of
from moegate.routing import outputs_of
from moegate.selection import select_kernel, select_text

pytestmark = pytest.mark.cpu

CPU, STREAM = torch.device("cpu"), 7
TOKENS = 5


class Recorder:
    """Stands for a loaded module and for each of its kernels."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def kernel(self, *given: object, **named: object) -> Recorder:
        return self

    def launch(self, grid: tuple[int, int], stream: int, *arguments: int) -> None:
        assert stream == STREAM
        self.launches.append(arguments)

    def last(self, arguments: text.Arguments) -> dict[str, int]:
        """The last launch, by field."""
        return dict(zip(arguments.fields, self.launches[-1], strict=True))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder()
    monkeypatch.setattr(jit, "load", lambda *given: found)
    monkeypatch.setattr(gpu, "chip_of", lambda *given: Chip(132, True, 227 << 10))
    monkeypatch.setattr(gpu, "_empty_strided_cuda", lambda shape, strides, dtype: torch.empty(shape, dtype=dtype))
    return found


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def a_call(spec: RouterSpec) -> tuple[Problem, Call]:
    """A problem and a call of it whose tensors are all different."""
    tensors = tensors_of(spec)
    weight = torch.randn(spec.num_gate_rows, spec.hidden_size + 8, generator=generator(0)).bfloat16()
    hidden = torch.randn(TOKENS, spec.hidden_size + 16, generator=generator(1)).bfloat16()
    ids = token_ids(TOKENS) if spec.hash_routing else None
    made = (
        torch.empty(output.shape(TOKENS), dtype=output.dtype) if output.is_there else None
        for output in outputs_of(spec)
    )
    out = Routing(*made)  # type: ignore[arg-type]
    size = spec.hidden_size
    padding = torch.tensor([False] * TOKENS)
    call = Call(TOKENS, hidden[:, :size], weight[:, :size], tensors, ids, padding, {}, out, STREAM)
    return a_problem(spec, dtypes_of(spec, torch.bfloat16, tensors)._replace(padding=torch.bool)), call


@pytest.mark.parametrize("name", SPECS)
def test_the_router_gemm(name: str, recorder: Recorder) -> None:
    spec = SPECS[name]
    problem, call = a_call(spec)
    logits = router_gemm.BoundRouterGemm(problem, CPU)(call)
    assert call.out is not None
    assert logits is call.out.logits
    assert recorder.last(router_gemm.ARGUMENTS) == {
        "hidden": address(call.hidden),
        "weight": address(call.weight),
        "bias": address(call.tensors.bias),
        "input_scale": address(call.tensors.input_scale),
        "logits": address(logits),
        "hidden_stride": spec.hidden_size + 16,
        "weight_stride": spec.hidden_size + 8,
        "num_tokens": TOKENS,
    }


@pytest.mark.parametrize("num_splits", [0, 3])  # 0: of logits
@pytest.mark.parametrize("name", SPECS)
def test_the_selection(name: str, num_splits: int, recorder: Recorder) -> None:
    spec = SPECS[name]
    problem, call = a_call(spec)
    out, tensors = call.out, call.tensors
    assert out is not None
    assert out.logits is not None
    rows, factors = spec.num_gate_rows, None if spec.input_norm_eps is None else torch.ones(TOKENS)
    sums = torch.randn(max(1, num_splits), TOKENS, rows + 4, generator=generator(2))
    behind = router_gemm.BoundRouterGemm(problem, CPU) if num_splits == 0 else cublas.BoundCublas(problem, CPU)
    selection = select_kernel.BoundSelect(problem, CPU, behind)
    routing = selection(call, PartialSums(sums, factors) if num_splits else out.logits)
    for given, returned in zip(out, routing, strict=True):
        assert given is returned
    table = tensors.tid2eid
    assert recorder.last(select_text.ARGUMENTS) == {
        "logits": address(sums if num_splits else out.logits),
        "correction_bias": address(tensors.e_score_correction_bias),
        "per_expert_scale": address(tensors.per_expert_scale),
        "global_scale": address(tensors.global_scale),
        "tid2eid": address(table),
        "input_ids": address(call.input_ids),
        "padding": address(call.padding),
        "bias": address(tensors.bias),
        "norm_factors": address(factors) if num_splits else 0,
        "made_logits": address(out.logits),
        "topk_ids": address(out.topk_ids),
        "topk_weights": address(out.topk_weights),
        "shared_weights": address(out.shared_weights),
        "identity_weight": address(out.identity_weight),
        "logits_stride": rows + 4 if num_splits else rows,
        "table_stride": 0 if table is None else table.stride(0),
        "table_rows": 0 if table is None else len(table),
        "num_tokens": TOKENS,
        "num_splits": num_splits,
        "holds_dependents": num_splits == 0,
    }


@pytest.mark.parametrize("more", [0, 1])
def test_dependents_are_held_back_up_to_a_number_of_tokens(more: int, recorder: Recorder) -> None:
    problem, call = a_call(SPECS["softmax"])
    behind = router_gemm.BoundRouterGemm(problem, CPU)
    num_tokens = behind.holds_dependents_to + more
    logits = torch.empty(num_tokens, problem.spec.num_gate_rows)
    padding = torch.zeros(num_tokens, dtype=torch.bool)
    select_kernel.BoundSelect(problem, CPU, behind)(
        call._replace(num_tokens=num_tokens, padding=padding, out=None), logits
    )
    assert recorder.last(select_text.ARGUMENTS)["holds_dependents"] == (more == 0)


@pytest.mark.parametrize("has_norm", [False, True])
def test_what_is_around_cublas(has_norm: bool, recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = RouterSpec(64, 12, 2, linear_bias=True, input_norm_eps=1e-6 if has_norm else None)
    problem, call = a_call(spec)
    bound = cublas.BoundCublas(problem, CPU)
    assert bound._prepare is not None  # 12 rows are no multiple of 8
    terms, factors = bound._prepared(bound._prepare, call)
    hidden = call.hidden
    assert recorder.last(cublas.PREPARE_ARGUMENTS) == {
        "weight": address(call.weight),
        "terms": address(terms),
        "input_scale": address(call.tensors.input_scale),
        "hidden": address(hidden),
        "factors": address(factors),
        "weight_stride": call.weight.stride(0),
        "hidden_stride": hidden.stride(0),
        "num_tokens": TOKENS,
    }
    sums, bias, logits = torch.randn(3, TOKENS, 16), call.tensors.bias, torch.empty(TOKENS, 12)
    bound.reduce(PartialSums(sums, None), bias, logits, STREAM)
    assert recorder.last(cublas.REDUCE_ARGUMENTS) == {
        "partial_sums": address(sums),
        "bias": address(bias),
        "logits": address(logits),
        "count": TOKENS * 12,
        "stride": 16,
        "num_splits": 3,
    }


def test_a_selection_alone_reads_logits_whose_rows_are_apart(recorder: Recorder) -> None:
    spec = SPECS["sigmoid with bias in groups"]
    problem, call = a_call(spec)
    logits = torch.randn(TOKENS, spec.num_gate_rows + 4)[:, : spec.num_gate_rows]
    routing = select_kernel.BoundSelect(problem, CPU, None)(call._replace(out=None), logits)
    found = recorder.last(select_text.ARGUMENTS)
    assert (found["logits"], found["logits_stride"]) == (address(logits), spec.num_gate_rows + 4)
    assert (found["topk_ids"], found["topk_weights"]) == (address(routing.topk_ids), address(routing.topk_weights))
    assert found["holds_dependents"] == 0
