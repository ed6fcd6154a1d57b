"""Many tokens: the products of cuBLAS, of a float32 weight that is taken apart, too, and the logits made of them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from cuda_kernels import (
    assert_same_bits,
    copy_of,
    gate_on_gpu,
    on_gpu,
    problems_of,
    random_hidden,
    random_weight,
    run,
)
from routers import SPECS, tensors_of, token_ids, with_bfloat16_logits
from torch import Tensor

import moegate
from moegate import RouterSpec
from moegate.backends.cuda import CudaBackend, selection, split
from moegate.backends.cuda.router import CudaRouter
from moegate.choice import planned

pytestmark = pytest.mark.gpu

MINIMAX = RouterSpec(3072, 256, 8, "sigmoid", "score", renormalize=True, weight_dtype="float32")
SHAPES = {
    "minimax-m2": MINIMAX,
    "odd": RouterSpec(1000, 7, 5, "sigmoid", renormalize=True, weight_dtype="float32"),
    "bias": RouterSpec(2880, 33, 4, "identity", weights_from="softmax_of_selected", linear_bias=True),
    "bfloat16 logits": dataclasses.replace(MINIMAX, logits_dtype="bfloat16"),
    "many rows": RouterSpec(6144, 768, 12, correction_bias="score", weight_dtype="float32"),
}
ALL = {**SPECS, **{f"{name}, bfloat16 logits": with_bfloat16_logits(spec) for name, spec in SPECS.items()}}


@pytest.fixture(autouse=True)
def cublas_beyond_64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever a table says of router_gemm."""
    monkeypatch.setattr(planned, "gemm_tokens", lambda facts: 64)
    planned.planned.cache_clear()
    yield
    planned.planned.cache_clear()


@pytest.mark.parametrize("weight", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_every_spec(name: str, weight: torch.dtype) -> None:
    """As the contract has it, and as the selection does it that is given the logits."""
    spec = ALL[name]
    tensors, ids = on_gpu(tensors_of(spec)), token_ids(65).cuda() if spec.hash_routing else None
    for hidden_dtype in (torch.bfloat16, torch.float16):  # the second is no operand of the first's product
        hidden = random_hidden(spec, 65, hidden_dtype)
        for frozen in (False, True):
            gate = gate_on_gpu(spec, weight, frozen=frozen)
            routing = run(gate, hidden)
            assert problems_of(routing, hidden, gate.weight, spec, tensors_of(spec)) == []
            assert routing.logits is not None
            assert_same_bits(routing, CudaBackend().select(routing.logits, spec, tensors, ids))


def test_float16() -> None:
    spec = with_bfloat16_logits(SPECS["softmax of selected"])
    gate, hidden = gate_on_gpu(spec, torch.float16), random_hidden(spec, 300, torch.float16)
    assert problems_of(run(gate, hidden), hidden, gate.weight, spec, tensors_of(spec)) == []


@pytest.mark.parametrize("rows", [65, 257, 3000])
@pytest.mark.parametrize("name", SHAPES)
def test_the_contract_is_kept(name: str, rows: int) -> None:
    spec = SHAPES[name]
    hidden = random_hidden(spec, rows)
    safe, frozen = (gate_on_gpu(spec, torch.float32, frozen=frozen) for frozen in (False, True))
    expected = run(safe, hidden)
    assert problems_of(expected, hidden, safe.weight, spec, tensors_of(spec)) == []
    for gate in (frozen, gate_on_gpu(spec, torch.float32, pdl=False)):
        assert isinstance(gate._prepared, CudaRouter)
        assert all(kernels.of_products for kernels in gate._prepared._select_by_inputs.values())
        assert_same_bits(run(gate, hidden), expected)
    out = copy_of(expected)
    for part in out:
        if part is not None:
            part.fill_(-1)
    assert_same_bits(safe(hidden, return_logits=True, out=out), expected)


BIASES = (None, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("bias_dtype", BIASES, ids=str)
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("hidden_size", "rows"), [(3072, 256), (1000, 7), (8, 1), (64, 1024)])
def test_the_kernels_to_the_bit(
    hidden_size: int, rows: int, logits_dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    """Three parts that add up to the weight, and sums in the order that is written there."""
    weight = torch.randn(rows, hidden_size, device="cuda")
    device, stream = weight.device, torch.cuda.current_stream().cuda_stream
    kernels = split.split_kernels(hidden_size, rows, bias_dtype, logits_dtype, device, pdl=True)
    first = weight.bfloat16()
    second = (weight - first.float()).bfloat16()
    third = (weight - first.float() - second.float()).bfloat16()
    assert weight.equal(first.float() + (second.float() + third.float()))
    assert kernels.parts(weight, stream).equal(torch.cat([first, second, third]))

    products = torch.randn(300, 3 * rows, device="cuda")
    bias = None if bias_dtype is None else torch.randn(rows, device="cuda").to(bias_dtype)
    logits = torch.full((300, rows), torch.nan, device="cuda", dtype=logits_dtype)
    kernels.add_up(products, bias, logits, stream)
    one, two, three = products.split(rows, 1)
    expected = one + (two + three)
    expected = expected if bias is None else expected + bias.float()
    assert logits.equal(expected.to(logits_dtype))


def products_of(name: str, products: int) -> Tensor:
    """[M, products * R], in which some tokens have what no product should be."""
    made = torch.randn(300, products * ALL[name].num_gate_rows, device="cuda")
    for token, value in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, 1e-42)):
        made[token, :: token + 1] = value
    return made


@pytest.mark.parametrize("products", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_logits_of_products_to_the_bit(name: str, products: int) -> None:
    """Also by ones, as it is for a logits tensor of the caller's that starts anywhere."""
    spec, tensors = ALL[name], on_gpu(tensors_of(ALL[name]))
    ids = token_ids(300).cuda() if spec.hash_routing else None
    given, stream = products_of(name, products), torch.cuda.current_stream().cuda_stream
    one, *others = given.split(spec.num_gate_rows, 1)
    logits = one + (others[0] + others[1]) if others else one
    logits = logits if tensors.bias is None else logits + tensors.bias
    logits = logits.to(getattr(torch, spec.logits_dtype))
    expected = CudaBackend().select(logits, spec, tensors, ids)
    dtypes = selection.select_dtypes(logits.dtype, tensors, None if ids is None else ids.dtype)
    dtypes = dtypes._replace(bias=None if tensors.bias is None else tensors.bias.dtype)
    for aligned in (True, False):
        kernels = selection.select_kernels(
            spec, dtypes, given.device, aligned=aligned, frozen=False, pdl=True, products=products
        )
        room = torch.full((logits.numel() + 1,), -1, dtype=logits.dtype, device="cuda")
        routing = kernels.outputs(room[0 if aligned else 1 :][: logits.numel()].view_as(logits))
        kernels.launch(routing, tensors, ids, stream, products=given)
        for part, right in zip(routing, expected, strict=True):
            if part is not None and right is not None:
                torch.testing.assert_close(part, right, rtol=0, atol=0, equal_nan=True)


def test_rows_that_are_apart_or_do_not_start_at_16_bytes() -> None:
    weight, hidden = random_weight(MINIMAX), random_hidden(MINIMAX, 65)
    expected = run(gate_on_gpu(MINIMAX, weight=weight), hidden)
    for columns, first in ((8, 0), (1, 1)):
        wide = torch.full((256, 3072 + columns), torch.nan, device="cuda")
        rows = wide[:, first : first + 3072]
        rows.copy_(weight)
        for frozen in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a copy in every call
                assert_same_bits(run(gate_on_gpu(MINIMAX, weight=rows, frozen=frozen), hidden), expected)


def test_the_product_by_itself_has_the_bits_of_the_gate() -> None:
    weight, hidden = random_weight(MINIMAX), random_hidden(MINIMAX, 300)
    expected = run(gate_on_gpu(MINIMAX, weight=weight), hidden).logits
    assert expected is not None
    assert moegate.router_gemm(hidden, weight).equal(expected)


def test_weights_of_all_magnitudes() -> None:
    """Parts that are far below what their neighbours are."""
    spec = SHAPES["minimax-m2"]
    hidden = random_hidden(spec, 300)
    gate = gate_on_gpu(spec, frozen=False)
    with torch.no_grad():
        gate.weight.mul_(torch.logspace(-12, 6, spec.hidden_size, device="cuda"))
        gate.weight[::3] *= -1e-20
    assert problems_of(run(gate, hidden), hidden, gate.weight, spec, tensors_of(spec)) == []


@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.float32], ids=str)
def test_other_hidden_states_take_the_plain_product(hidden_dtype: torch.dtype) -> None:
    assert split.unsupported(hidden_dtype, torch.float32, None) is not None
    hidden = random_hidden(MINIMAX, 300, hidden_dtype)
    gate = gate_on_gpu(MINIMAX)
    assert problems_of(run(gate, hidden), hidden, gate.weight, MINIMAX, tensors_of(MINIMAX)) == []


def test_captured_in_a_graph() -> None:
    gate, hidden = gate_on_gpu(MINIMAX), random_hidden(MINIMAX, 300)
    expected = run(gate, hidden)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(gate, hidden)
    for seed in (7, 8):
        hidden.copy_(random_hidden(MINIMAX, 300, seed=seed))
        expected = run(gate, hidden)
        graph.replay()
        assert_same_bits(captured, expected)


def test_the_backend_without_a_gate() -> None:
    hidden, gate = random_hidden(MINIMAX, 100), gate_on_gpu(MINIMAX)
    weight, tensors = gate._tensors()
    got = CudaBackend().route(hidden, weight, MINIMAX, tensors, None, None)
    assert_same_bits(got, run(gate, hidden))
