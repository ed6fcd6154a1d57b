"""The spans of a plan are its choices, and a dispatch runs them: at every number of tokens, for every policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from cost_tables import CUBLAS, DECODE, GPU, HERE, OPS, a_table, problem
from machines import CPU, described, forget, pretend, pretended
from torch import Tensor

from moegate import Gate, RouterSpec, get_spec
from moegate.choice import dispatch as dispatch_module
from moegate.choice.dispatch import Dispatch, Options, for_gemm, for_route, for_selection
from moegate.choice.machines import machine_of
from moegate.choice.plan import Plan
from moegate.halves import BoundGemm
from moegate.problem import Dtypes, Problem, problem_of
from moegate.routing import RouterTensors
from moegate.selection.torch_ops import BoundOps, TorchOps

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("shipped")]

TOKENS = [*range(1, 140), *range(140, 1100, 7), 1023, 1024, 1025, 2000, 3000, 4095, 4096, 5000, 70000, 1 << 20, 1 << 21]
TIMES = {
    "none": {},
    "a crossover at 256": {128: {DECODE: 7.0, CUBLAS: 8.0}, 512: {DECODE: 20.0, CUBLAS: 9.0}},
    "PyTorch's operations win between two probes": {
        2048: {CUBLAS: 60.0, OPS: 90.0},
        4096: {CUBLAS: 200.0, OPS: 150.0},
    },
}


def plans() -> list[Plan]:
    here = dataclasses.replace(GPU, flashinfer="0.7.2")
    asked = [problem(machine=here), problem(machine=here).given(torch.float32, None), problem("gpt-oss-120b", here)]
    asked += [problem_of(described("sm_103", "0.6.8"), get_spec("deepseek-v3"), torch.bfloat16)]
    asked += [problem_of(HERE, RouterSpec(100, 8, 2), torch.bfloat16)]  # a K that router_gemm cannot take
    ways = [
        ("measured", None),
        ("sglang", None),
        ("measured", "torch"),
        ("measured", "cuda"),
        ("measured", "flashinfer"),
    ]
    made = []
    for each in asked:
        for policy, backend in ways:
            try:
                made.append(Plan(each, policy, backend))
            except ValueError:  # a forced backend that cannot run this problem
                assert backend == "flashinfer"
    return made


@pytest.mark.parametrize("times", TIMES)
def test_spans_are_the_choices(times: str, shipped: Callable[..., None]) -> None:
    shipped(a_table(deepseek_v3=TIMES[times] | {1: {DECODE: 3.0}}))
    for plan in plans():
        for tokens in TOKENS:
            inside = [span.candidate for span in plan.spans if span.first <= tokens <= (span.last or tokens)]
            try:
                assert inside == [plan.choice(tokens).candidate], (str(plan.problem), plan.policy, plan.backend, tokens)
            except ValueError:
                assert inside == []


def test_where_a_forced_backend_cannot_run_the_call_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's GEMM up to 16 tokens, and nothing beyond, of a router that its top-k does not take."""
    pretend(monkeypatch, pretended((10, 3), "0.7.2"))
    spec = RouterSpec(7168, 256, 8)
    monkeypatch.setattr("moegate.gemm.flashinfer_mm.FlashInferMm.try_out", lambda *_: None)
    dispatch = Dispatch(
        Plan(
            Problem(pretended((10, 3), "0.7.2"), spec, problem_of(HERE, spec, torch.bfloat16).dtypes),
            backend="flashinfer",
        )
    )
    monkeypatch.setattr("moegate.gemm.flashinfer_mm.FlashInferMm.bind", lambda *_: _Zeros())
    hidden, weight = torch.zeros(20, 7168, dtype=torch.bfloat16), torch.zeros(256, 7168, dtype=torch.bfloat16)
    for rows in (0, 1, 16):
        assert dispatch.route(hidden[:rows], weight, RouterTensors(), None, {}).topk_ids.shape == (rows, 8)
    with pytest.raises(ValueError, match="backend: got 'flashinfer', which cannot route 17 tokens here"):
        dispatch.route(hidden[:17], weight, RouterTensors(), None, {})
    forget()


class _Zeros:
    num_terms = holds_dependents_to = 0

    def __call__(self, call: object) -> Tensor:
        return torch.zeros(getattr(call, "num_tokens"), 256)  # noqa: B009

    logits = __call__


def test_the_halves_run_the_plan_of_a_router_with_their_logits(
    shipped: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped(a_table(deepseek_v3={128: {DECODE: 7.0, CUBLAS: 8.0}, 256: {DECODE: 11.0, CUBLAS: 9.0}}))
    pretend(monkeypatch, HERE)
    weight, spec = torch.zeros(256, 7168, dtype=torch.bfloat16), get_spec("deepseek-v3")
    tensors = RouterTensors(e_score_correction_bias=torch.zeros(256))
    whole = for_route(CPU, spec, weight, tensors, Options())
    gemm = for_gemm(CPU, weight, None, torch.float32, Options())
    for dispatch in (whole, gemm):
        assert [span.last for span in dispatch.plan.spans][:1] == [128]
    for dtype in (torch.float32, torch.bfloat16):
        selection = for_selection(CPU, spec, dtype, tensors, Options())
        assert selection.plan.problem.logits_dtype == dtype
        assert selection.plan.spans[0].candidate.backend == "cuda"


def test_what_is_bound_knows_the_dtypes_of_ids_and_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel is compiled for them: one that was bound for other dtypes would read them wrongly."""
    bound: list[tuple[torch.dtype | None, torch.dtype | None]] = []
    bind = TorchOps.bind

    def recorded(self: TorchOps, problem: Problem, device: torch.device, gemm: BoundGemm | None) -> BoundOps:
        bound.append((problem.dtypes.input_ids, problem.dtypes.padding))
        return bind(self, problem, device, gemm)

    monkeypatch.setattr(TorchOps, "bind", recorded)
    dispatch = Dispatch(
        Plan(Problem(machine_of(torch.device("cpu")), RouterSpec(16, 8, 2), Dtypes(torch.float32, torch.float32)))
    )
    ids, padding = torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.bool)
    asked = [(None, None), (ids, None), (ids.long(), None), (None, padding), (None, ids[:1]), (ids, padding)]
    for given in asked:
        for _ in range(2):
            dispatch._at("both", 4, torch.float32, *given)
    dtypes = [tuple(None if part is None else part.dtype for part in given) for given in asked]
    assert bound == dtypes


def test_a_call_of_a_prepared_module_says_what_it_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once for each dtype; what was made ready is not told of."""
    forget()
    monkeypatch.setattr(dispatch_module, "_SECONDS_OF_COMPILING", -1.0)
    gate = Gate(RouterSpec(64, 8, 2), torch.ones(8, 64))
    for dtype in (torch.bfloat16, torch.float16, torch.float16):
        gate(torch.ones(3, 64, dtype=dtype))
    (told,) = [each.message for each in caplog.records if each.levelname == "WARNING"]
    assert told.startswith("a call waited ")
    assert "float16 hidden, float32 weight" in told
    assert told.endswith("warmup() does so before")
