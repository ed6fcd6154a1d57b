"""The measurements of `tune` and `bench` on a CPU: all code that runs on a GPU except for graphs and clock."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from machines import CPU, forget, pretend, pretended

from moegate import catalog, get_spec
from moegate.choice.candidates import CANDIDATES, CUBLAS, ROUTER_GEMM
from moegate.choice.dispatch import Dispatch
from moegate.choice.plan import Plan
from moegate.contract.reference import router_logits
from moegate.contract.reference import select as reference_select
from moegate.measure import bench, layers, session, timing
from moegate.measure.names import NOT_FROZEN
from moegate.measure.timing import Contestant, Workload
from moegate.measure.transformers_router import transformers_router
from moegate.measure.tune import MODELS
from moegate.problem import problem_of
from moegate.synthetic import random_hidden, random_tensors

MACHINE = pretended((9, 0), None, name="NVIDIA H200")


def without_a_clock(work: Workload, way: str, contestants: list[Contestant]) -> dict[str, dict[str, Any]]:
    """Calls and checks every contestant as `timing.measure` does, and gives each the same time."""
    found: dict[str, dict[str, Any]] = {}
    for contestant in contestants:
        try:
            results = [contestant.call(layer, work.sources[source]) for source, layer in work.order(way)]
        except Exception as error:
            found[contestant.name] = {"absent": timing.reason_of(error)}
            continue
        verdict = contestant.check(results, work.order(way))
        found[contestant.name] = {**({"us": 2.5} if verdict["ok"] else {}), **verdict}
    return found


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[session.Session]:
    pretend(monkeypatch, MACHINE)
    for module in (session, layers):
        monkeypatch.setattr(module, "gpu", lambda: CPU)
    monkeypatch.setattr(session, "machine_of", lambda device: MACHINE)
    monkeypatch.setattr(session, "calibrate", lambda work: 1.0)
    monkeypatch.setattr(timing, "measure", without_a_clock)
    monkeypatch.setattr(layers, "layer_count", lambda size: 3)
    monkeypatch.setattr(layers, "compiled", lambda function: function)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"multi_processor_count": 1}))
    yield session.Session()
    forget()


@pytest.mark.parametrize("model", MODELS)
def test_every_candidate_of_a_tuned_model_is_right_or_says_why_not(here: session.Session, model: str) -> None:
    spec = get_spec(model)
    own = ["cuda:router_gemm+select", "cuda:cublas+select"]
    dot_products = ["cuda:dot_gemm+select"] * (spec.weight_dtype == "float32")
    for tokens, ours in ((2, own[:1] + dot_products), (65, own), (1025, own[1:])):
        found = here.measure(spec, tokens, "trigger")
        not_frozen = [key + NOT_FROZEN for key in ours]
        assert len(found) == len(CANDIDATES) + len(ours)
        for key, entry in found.items():
            if key in (*ours, *not_frozen, "torch:mm+ops"):
                assert entry["ok"] is True, (tokens, key, entry)
            else:
                assert entry["absent"], (tokens, key)


def test_both_gemms_of_the_cuda_backend_are_measured_each_by_itself(here: session.Session) -> None:
    """Whichever of the two the plan would run."""
    plan = Plan(problem_of(MACHINE, get_spec("deepseek-v3"), torch.bfloat16))
    for candidate in (ROUTER_GEMM, CUBLAS):
        dispatch = Dispatch(plan, only=candidate)
        assert len({dispatch._at("both", tokens, torch.bfloat16) for tokens in (1, 64, 65, 1024, 4096)}) == 1
        assert dispatch.name == candidate.backend


def test_a_case_of_bench(here: session.Session) -> None:
    spec = get_spec("qwen3-30b-a3b")
    source = bench.Source("qwen3-30b-a3b", spec, catalog.get_model("qwen3-30b-a3b").config)
    row = bench.measure_case(here, source, 4, "cold")
    found = row["contestants"]
    assert (row["plan"], row["gate_rows"]) == ("cuda:router_gemm+select", 128)
    assert row["plan_not_frozen"] == "cuda:router_gemm+select, not frozen"
    assert found[row["plan_not_frozen"]]["ok"] is True
    assert row["keeps_contract"] == ["cuda:router_gemm+select", "cuda:cublas+select"]
    for name in ("moegate", "moegate, not frozen", "cuda:router_gemm+select", "torch.compile", "Transformers' router"):
        assert found[name]["ok"] is True, (name, found[name])
        assert found[name]["agreement"] > 0.9, (name, found[name])
    assert found["cuBLAS + compiled top-k"]["ok"] is True
    assert "FlashInfer is not installed" in found["flashinfer:cublas+fused_topk_deepseek"]["absent"] or (
        "not the router of" in found["flashinfer:cublas+fused_topk_deepseek"]["absent"]
    )
    assert "absent" in found["floor"]  # the only kernel without a replacement on a CPU


@pytest.mark.parametrize(
    "model", ["deepseek-v3", "qwen3-30b-a3b", "gpt-oss-120b", "mixtral-8x7b", "glm-5", "openai-privacy-filter"]
)
def test_transformers_router_chooses_like_float64(model: str) -> None:
    spec = get_spec(model)
    weight, tensors = random_tensors(spec, seed=3)
    router = transformers_router(catalog.get_model(model).config, tensors, CPU)
    hidden = random_hidden(spec, 40, seed=4)
    ids, weights = router.route(hidden, weight)
    exact = router_logits(hidden, weight, spec, tensors)
    want = reference_select(exact, spec, tensors, None)
    same = (ids.sort(-1).values == want.topk_ids.sort(-1).values).all(-1)
    assert same.double().mean() > (0.9 if spec.logits_dtype == "float32" else 0.6)
    sums = router.output_factor * weights.double().sum(-1)[same], want.topk_weights.double().sum(-1)[same]
    torch.testing.assert_close(*sums, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("model", ["kimi-k2", "deepseek-v4-flash-hash"])
def test_a_router_without_a_class_says_so(model: str) -> None:
    _, tensors = random_tensors(get_spec(model))
    with pytest.raises(NotImplementedError, match="no class for this router"):
        transformers_router(catalog.get_model(model).config, tensors, CPU)
