"""Rows that are padding, by the kernels: in each size of the selection, and in a CUDA graph that is replayed."""

from __future__ import annotations

import pytest
import torch
from cuda_kernels import copy_of, gate_on_gpu, on_gpu, problems_of, random_hidden, random_weight
from routers import SPECS, tensors_of, token_ids

from moegate import Routing


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["softmax", "sigmoid with bias in groups", "sigmoid with shared gates", "hash"])
def test_a_graph_is_replayed_with_other_padding(name: str, frozen: bool) -> None:
    """Of few and of many tokens: logits of router_gemm, and the partial sums behind cuBLAS."""
    spec = SPECS[name]
    weight = random_weight(spec)
    gate = gate_on_gpu(spec, weight=weight, frozen=frozen)
    for rows in (1, 9, 64, 300, 1100):
        hidden, ids = random_hidden(spec, rows), token_ids(rows).cuda() if spec.hash_routing else None
        for padding in (torch.zeros(rows, dtype=torch.bool, device="cuda"), torch.tensor([rows], device="cuda").int()):
            gate.warmup(torch.bfloat16, padding=padding.dtype)
            out = gate(hidden, input_ids=ids, padding=padding, return_logits=True)
            without = copy_of(out)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                gate(hidden, input_ids=ids, padding=padding, return_logits=True, out=out)
            for kept in (rows, rows // 2, 0):
                is_padding = torch.arange(rows, device="cuda") >= kept
                padding.copy_(is_padding if padding.dtype == torch.bool else torch.tensor([kept]))
                for part in out:
                    if part is not None:
                        part.fill_(torch.nan if part.is_floating_point() else 77)
                graph.replay()
                assert out.topk_ids[kept:].eq(-1).all()
                assert out.topk_weights[kept:].eq(0).all()
                assert out.shared_weights is None or out.shared_weights[kept:].eq(0).all()
                for mine, theirs in zip(out, without, strict=True):
                    assert mine is None or theirs is None or mine[:kept].equal(theirs[:kept])
                assert out.logits is not None
                assert without.logits is not None
                assert out.logits.equal(without.logits)
            tokens = Routing(*(None if part is None else part.cpu() for part in without))  # type: ignore[arg-type]
            assert problems_of(tokens, hidden, weight, spec, on_gpu(tensors_of(spec))) == []
