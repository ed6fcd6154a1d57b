"""An input norm at many tokens: the scale is in the weight for cuBLAS, the norm's factor in the logits."""

from __future__ import annotations

import pytest
import torch
from cuda_kernels import a_call, bound_cublas, on_gpu, problems_of, random_hidden, random_weight, routed_by
from routers import tensors_of
from torch import Tensor

from moegate import RouterSpec, Routing
from moegate.choice.candidates import CUBLAS
from moegate.routing import RouterTensors

GEMMA_4 = RouterSpec(2816, 128, 8, renormalize=True, input_norm_eps=1e-6, per_expert_scale=True)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("hidden_size", "rows"), [(2816, 128), (1000, 7), (8, 1)])
def test_an_input_norm_is_in_the_weight_and_in_a_factor(
    hidden_size: int, rows: int, weight_dtype: torch.dtype, scale_dtype: torch.dtype
) -> None:
    weight = torch.randn(rows, hidden_size, device="cuda").to(weight_dtype)
    scale = (1 + 0.1 * torch.randn(hidden_size, device="cuda")).to(scale_dtype)
    scaled = weight.float() * scale.float()
    tensors = RouterTensors(input_scale=scale)
    bound = bound_cublas(RouterSpec(hidden_size, rows, 1, input_norm_eps=1e-6), weight, tensors)
    assert bound._prepare is not None
    for tokens in (1, 300, 20000):  # at the last, more tokens than warps
        hidden = torch.randn(tokens, hidden_size, device="cuda").bfloat16() * (1 + torch.arange(tokens)[:, None]).cuda()
        hidden = hidden.bfloat16()
        terms, factors = bound._prepared(bound._prepare, a_call(hidden, weight, tensors))
        columns = rows * (2 if weight_dtype == scale_dtype == torch.bfloat16 else 3)
        assert len(terms) == -(-columns // 8) * 8
        assert not terms[columns:].any()
        assert factors is not None
        first, *others = terms[:columns].float().split(rows)
        assert scaled.equal(first + sum(reversed(others)))
        exact = hidden_size**-0.5 / torch.sqrt(hidden.double().square().mean(-1) + 1e-6)
        torch.testing.assert_close(factors.double(), exact, rtol=16 * 2.0**-24, atol=0)  # contract 1.2


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_input_norm_keeps_the_contract(weight_dtype: torch.dtype, scale_dtype: torch.dtype) -> None:
    spec = GEMMA_4
    tensors = tensors_of(spec)
    assert tensors.input_scale is not None
    tensors = tensors._replace(input_scale=tensors.input_scale.to(scale_dtype))
    weight, given = random_weight(spec, weight_dtype), on_gpu(tensors)

    def route(hidden: Tensor) -> Routing:
        return routed_by(CUBLAS, hidden, weight, spec, given)

    for rows in (65, 500, 3000):
        wide = torch.full((rows, spec.hidden_size + 8), torch.nan, dtype=torch.bfloat16, device="cuda")
        hidden = wide[:, : spec.hidden_size].copy_(random_hidden(spec, rows))
        hidden[1] *= 1000
        hidden[2] *= 1e-9  # the norm depends on eps alone
        hidden[3] = 0
        routing = route(hidden)
        assert problems_of(routing, hidden, weight, spec, tensors) == []
        hidden[4, 7], hidden[5, 8] = torch.nan, torch.inf
        special = route(hidden)
        assert special.topk_weights[4:6].isnan().all()
        keeps = torch.arange(rows) // 2 != 2
        assert special.topk_ids[keeps].equal(routing.topk_ids[keeps])
