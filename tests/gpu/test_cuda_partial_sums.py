"""Logits made of cuBLAS's partial sums, to the bit: by the selection, and by the kernel that only adds."""

from __future__ import annotations

import itertools
from typing import NoReturn

import pytest
import torch
from cuda_kernels import a_call, a_problem, bound_cublas, on_gpu, selected
from routers import SPECS, tensors_of, token_ids, with_bfloat16_logits
from torch import Tensor

from moegate import RouterSpec, Routing
from moegate.halves import Call, PartialSums
from moegate.problem import dtypes_of
from moegate.routing import RouterTensors
from moegate.selection.select_kernel import BoundSelect

ALL = {**SPECS, **{f"{name}, bfloat16 logits": with_bfloat16_logits(spec) for name, spec in SPECS.items()}}


def random_sums(num_splits: int, tokens: int, columns: int) -> Tensor:
    """[S, M, columns], in which some tokens have NaN, infinities, or values at the ends of float32's range."""
    made = torch.randn(num_splits, tokens, columns, device="cuda")
    for token, value in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, 1e-42)):
        made[-1, token, :: token + 1] = value
    return made


def logits_of(
    sums: Tensor, rows: int, bias: Tensor | None, dtype: torch.dtype, factors: Tensor | None = None
) -> Tensor:
    """[S, M, num_terms * R] -> [M, R], added up in the order of partial_sums.cuh."""
    logits = torch.zeros(sums.shape[1], rows, device="cuda")
    for split in sums:
        first, *others = split.split(rows, 1)
        logits += first + sum(others[1:], others[0]) if others else first
    if factors is not None:
        logits *= factors[:, None]
    return (logits if bias is None else logits + bias.float()).to(dtype)


def terms_with(spec: RouterSpec) -> tuple[int, int]:
    """The possible numbers of terms of a weight."""
    return (1, 3) if spec.input_norm_eps is None else (2, 3)


class Terms:
    """Stands for the GEMM in front of a selection, with a weight of so many terms."""

    holds_dependents_to = 0

    def __init__(self, num_terms: int) -> None:
        self.num_terms = num_terms

    def __call__(self, call: Call) -> NoReturn:
        raise NotImplementedError

    logits = __call__


@pytest.mark.parametrize("aligned", [True, False])  # False: logits of a caller, which may start anywhere
@pytest.mark.parametrize(("name", "num_terms"), [(name, terms) for name in ALL for terms in terms_with(ALL[name])])
def test_logits_of_partial_sums_to_the_bit(name: str, num_terms: int, aligned: bool) -> None:
    spec, tensors = ALL[name], on_gpu(tensors_of(ALL[name]))
    dtype, rows = getattr(torch, spec.logits_dtype), spec.num_gate_rows
    problem = a_problem(spec, dtypes_of(spec, torch.bfloat16, tensors))
    select = BoundSelect(problem, torch.device("cuda", torch.cuda.current_device()), Terms(num_terms))
    for tokens, num_splits in itertools.product((65, 600, 1100), (1, 2, 5, 8)):  # M for each of three kernels
        ids = token_ids(tokens).cuda() if spec.hash_routing else None
        # Rows that are apart, as the partial sums of a weight with appended rows of zeros.
        sums = random_sums(num_splits, tokens, num_terms * rows + 8)[:, :, : num_terms * rows]
        factors = None if spec.input_norm_eps is None else torch.rand(tokens, device="cuda")
        logits = logits_of(sums, rows, tensors.bias, dtype, factors)
        expected = selected(logits, spec, tensors, ids)
        room = torch.full((logits.numel() + 1,), -1, dtype=dtype, device="cuda")
        place = room[0 if aligned else 1 :][: logits.numel()].view_as(logits)
        out = Routing(*(None if part is None else torch.full_like(part, -1) for part in expected))  # type: ignore[arg-type]
        call = a_call(sums[0], logits, tensors, input_ids=ids, out=out._replace(logits=place))
        for part, right in zip(select(call, PartialSums(sums, factors)), expected, strict=True):
            assert (part is None) == (right is None)
            if part is not None:
                torch.testing.assert_close(part, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_splits", [1, 7])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_reduced_splits_to_the_bit(
    weight_dtype: torch.dtype, num_splits: int, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    rows, logits_dtype = 37, "float32" if dtype == torch.float32 else "bfloat16"
    columns = rows * (3 if weight_dtype == torch.float32 else 1)
    sums = random_sums(num_splits, 300, columns + 5)
    bias = None if bias_dtype is None else torch.randn(rows, device="cuda").to(bias_dtype)
    logits = torch.full((300, rows), -1, device="cuda", dtype=dtype)
    spec = RouterSpec(64, rows, 1, linear_bias=bias is not None, logits_dtype=logits_dtype)  # type: ignore[arg-type]
    weight = torch.empty((rows, 64), dtype=weight_dtype, device="cuda")
    bound = bound_cublas(spec, weight, RouterTensors(bias))
    bound.reduce(PartialSums(sums, None), bias, logits, torch.cuda.current_stream().cuda_stream)
    expected = logits_of(sums[:, :, :columns], rows, bias, dtype)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)
