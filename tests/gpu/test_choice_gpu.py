"""The choice on a GPU: the plan's kernels run; FlashInfer, if installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moegate import Gate, get_spec
from moegate.synthetic import random_hidden, random_tensors

SPEC = get_spec("deepseek-v3")


def a_gate(**options: Any) -> Gate:
    weight, tensors = random_tensors(SPEC, device="cuda")
    return Gate(SPEC, weight, e_score_correction_bias=tensors.e_score_correction_bias, **options)


def with_flashinfer() -> Gate:
    try:
        return a_gate(backend="flashinfer")
    except ValueError as error:
        pytest.skip(f"FlashInfer does not run here: {error}")


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Asserts the same experts, except for one near-tie in fifty rows."""
    differ = int((one.sort(-1).values != other.sort(-1).values).any(-1).sum())
    return differ <= len(one) // 50


@pytest.mark.parametrize("tokens", [1, 64, 65])
def test_a_default_plan_runs_the_cuda_backend(tokens: int) -> None:
    gate, forced = a_gate(), a_gate(backend="cuda")
    hidden = random_hidden(SPEC, tokens, device="cuda")
    explanation = gate.explain(tokens)
    assert explanation.backend == "cuda"
    assert explanation.kernel == ("router_gemm+select" if tokens <= 64 else "cublas+select")
    for one, other in zip(gate(hidden)[:2], forced(hidden)[:2], strict=True):
        assert one is not None
        assert other is not None
        assert one.equal(other)


@pytest.mark.parametrize("tokens", [1, 16, 17, 300])
def test_flashinfer_chooses_like_ours(tokens: int) -> None:
    hidden = random_hidden(SPEC, tokens, device="cuda")
    gate = with_flashinfer()
    assert gate.explain(tokens).backend == "flashinfer"
    assert agree(gate(hidden).topk_ids, a_gate()(hidden).topk_ids)


def test_flashinfer_can_be_captured() -> None:
    gate, hidden = with_flashinfer(), random_hidden(SPEC, 8, device="cuda")
    eager = gate(hidden).topk_ids.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gate(hidden)
    graph.replay()
    torch.cuda.synchronize()
    assert captured.topk_ids.equal(eager)


@pytest.mark.parametrize("tokens", [0, 1, 16, 17])
def test_sglangs_rule_runs_what_it_says(tokens: int) -> None:
    gate, hidden = a_gate(policy="sglang"), random_hidden(SPEC, tokens, device="cuda")
    routing = gate(hidden, return_logits=True)
    assert routing.logits is not None
    assert routing.logits.dtype == torch.float32
    assert routing.topk_ids.shape == (tokens, 8)
    assert agree(routing.topk_ids, a_gate()(hidden).topk_ids)
    sm = "{}{}".format(*torch.cuda.get_device_capability())
    if sm == "90":
        assert gate.explain(tokens).backend == ("cuda" if 1 <= tokens <= 16 else "torch")
