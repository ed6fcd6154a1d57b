"""Many tokens: the products of cuBLAS, of a float32 weight that is taken apart, too, and the logits made of them."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Iterator

import pytest
import torch
from cuda_kernels import (
    DEEPSEEK_V3,
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
from moegate.arguments import check_gate
from moegate.backends.cuda import CudaBackend, selection
from moegate.backends.cuda.product import product_of, sum_of
from moegate.backends.cuda.router import CudaRouter
from moegate.choice import planned
from moegate.warn import warn_once

MINIMAX = RouterSpec(3072, 256, 8, "sigmoid", "score", renormalize=True, weight_dtype="float32")
SHAPES = {
    "minimax-m2": MINIMAX,
    "odd": RouterSpec(1000, 7, 5, "sigmoid", renormalize=True, weight_dtype="float32"),
    "bias": RouterSpec(2880, 33, 4, "identity", weights_from="softmax_of_selected", linear_bias=True),
    "bfloat16 logits": dataclasses.replace(MINIMAX, logits_dtype="bfloat16"),
    "many rows": RouterSpec(6144, 768, 12, correction_bias="score", weight_dtype="float32"),
    "input norm": RouterSpec(2816, 128, 8, renormalize=True, input_norm_eps=1e-6, per_expert_scale=True),
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
        prepared = gate._notice()[0].prepared
        assert isinstance(prepared, CudaRouter)
        assert all(kernels.of_products for kernels in prepared._select_by_inputs.values())
        assert_same_bits(run(gate, hidden), expected)
    out = copy_of(expected)
    for part in out:
        if part is not None:
            part.fill_(-1)
    assert_same_bits(safe(hidden, return_logits=True, out=out), expected)


@pytest.mark.parametrize(("hidden_size", "rows"), [(3072, 256), (1000, 7), (8, 1), (64, 1024)])
def test_the_parts_of_a_weight_to_the_bit(hidden_size: int, rows: int) -> None:
    weight = torch.randn(rows, hidden_size, device="cuda")
    first = weight.bfloat16()
    second = (weight - first.float()).bfloat16()
    third = (weight - first.float() - second.float()).bfloat16()
    assert weight.equal(first.float() + (second.float() + third.float()))
    product = product_of(hidden_size, rows, weight.dtype, weight.device, pdl=True)
    hidden = random_hidden(RouterSpec(hidden_size, rows, 1), 1)
    parts, factors = product.prepared(hidden, weight, None, torch.cuda.current_stream().cuda_stream)
    assert factors is None
    assert len(parts) == -(-3 * rows // 8) * 8
    assert parts[: 3 * rows].equal(torch.cat([first, second, third]))
    assert not parts[3 * rows :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("hidden_size", "rows"), [(6144, 258), (2048, 60), (1000, 7), (8, 1)])
def test_rows_of_zeros_where_their_number_is_no_multiple_of_8(hidden_size: int, rows: int, dtype: torch.dtype) -> None:
    wide = torch.randn(rows, hidden_size + 8, device="cuda").to(dtype)
    for weight in (wide[:, :hidden_size].contiguous(), wide[:, :hidden_size]):
        product = product_of(hidden_size, rows, dtype, weight.device, pdl=True)
        for tokens in (65, 2000):
            hidden = torch.randn(tokens, hidden_size, device="cuda").to(dtype)
            shares = product(hidden, weight, None, torch.cuda.current_stream().cuda_stream).shares
            assert shares.shape[2] % 8 == 0
            assert not shares[:, :, rows:].any()
            exact = hidden.double() @ weight.double().t()
            magnitude = hidden.double().abs() @ weight.double().abs().t()
            bound = 4 * hidden_size**0.5 * 2.0**-24 * magnitude  # contract 1.1
            assert ((shares[:, :, :rows].double().sum(0) - exact).abs() <= bound).all()


def random_products(shares: int, tokens: int, columns: int) -> Tensor:
    """[S, M, columns], in which some tokens have what no product should be."""
    made = torch.randn(shares, tokens, columns, device="cuda")
    for token, value in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, 1e-42)):
        made[-1, token, :: token + 1] = value
    return made


def logits_of(
    products: Tensor, rows: int, bias: Tensor | None, dtype: torch.dtype, factors: Tensor | None = None
) -> Tensor:
    """[S, M, parts * R] -> [M, R], added up in the order that products.cuh has."""
    logits = torch.zeros(products.shape[1], rows, device="cuda")
    for share in products:
        first, *others = share.split(rows, 1)
        logits += first + sum(others[1:], others[0]) if others else first
    if factors is not None:
        logits *= factors[:, None]
    return (logits if bias is None else logits + bias.float()).to(dtype)


def parts_with(spec: RouterSpec) -> tuple[int, int]:
    """How many parts a weight can have in products."""
    return (1, 3) if spec.input_norm_eps is None else (2, 3)


@pytest.mark.parametrize("aligned", [True, False])  # the second as it is for a caller's logits that start anywhere
@pytest.mark.parametrize(("name", "weight_parts"), [(name, parts) for name in ALL for parts in parts_with(ALL[name])])
def test_logits_of_products_to_the_bit(name: str, weight_parts: int, aligned: bool) -> None:
    spec, tensors = ALL[name], on_gpu(tensors_of(ALL[name]))
    dtype, rows = getattr(torch, spec.logits_dtype), spec.num_gate_rows
    dtypes = selection.select_dtypes(dtype, tensors, torch.int64 if spec.hash_routing else None)
    dtypes = dtypes._replace(bias=None if tensors.bias is None else tensors.bias.dtype)
    device, stream = torch.device("cuda", torch.cuda.current_device()), torch.cuda.current_stream().cuda_stream
    kernels = selection.select_kernels(
        spec, dtypes, device, aligned=aligned, frozen=False, pdl=True, weight_parts=weight_parts
    )
    for tokens, shares in itertools.product((65, 600, 1100), (1, 2, 5, 8)):  # each of the three kernels
        ids = token_ids(tokens).cuda() if spec.hash_routing else None
        # Rows that are apart, as they are behind a weight with rows of zeros.
        products = random_products(shares, tokens, weight_parts * rows + 8)[:, :, : weight_parts * rows]
        factors = None if spec.input_norm_eps is None else torch.rand(tokens, device="cuda")
        logits = logits_of(products, rows, tensors.bias, dtype, factors)
        room = torch.full((logits.numel() + 1,), -1, dtype=dtype, device="cuda")
        routing = kernels.outputs(room[0 if aligned else 1 :][: logits.numel()].view_as(logits), tokens)
        kernels.launch(routing, tensors, ids, tokens, stream, products=products, norm_factors=factors)
        for part, right in zip(routing, CudaBackend().select(logits, spec, tensors, ids), strict=True):
            assert (part is None) == (right is None)
            if part is not None:
                torch.testing.assert_close(part, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shares", [1, 7])
@pytest.mark.parametrize("weight_parts", [1, 3])
def test_sums_of_products_to_the_bit(
    weight_parts: int, shares: int, dtype: torch.dtype, bias_dtype: torch.dtype | None
) -> None:
    rows = 37
    columns = weight_parts * rows
    products = random_products(shares, 300, columns + 5)
    bias = None if bias_dtype is None else torch.randn(rows, device="cuda").to(bias_dtype)
    logits = torch.full((300, rows), -1, device="cuda", dtype=dtype)
    add_up = sum_of(rows, weight_parts, bias_dtype, dtype, logits.device)
    add_up(products, bias, logits, torch.cuda.current_stream().cuda_stream)
    expected = logits_of(products[:, :, :columns], rows, bias, dtype)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows", [65, 300, 700, 8000])
def test_shares_of_a_product(rows: int) -> None:
    """Each of them the product that it is to be, of hidden states whose rows are apart, too."""
    weight, hidden = random_weight(DEEPSEEK_V3), random_hidden(DEEPSEEK_V3, rows)
    apart = torch.full((rows, 7168 + 8), torch.nan, dtype=torch.bfloat16, device="cuda")[:, :7168].copy_(hidden)
    product = product_of(7168, 256, weight.dtype, weight.device, pdl=True)
    for given in (hidden, apart):
        products = product(given, weight, None, torch.cuda.current_stream().cuda_stream).shares
        assert (products.shape[0] > 1) == (rows <= 700)  # with 78 to 200 multiprocessors
        step = 7168 // products.shape[0]
        for share, of_share in enumerate(products):
            part = slice(share * step, (share + 1) * step)
            exact = hidden[:, part].double() @ weight[:, part].double().t()
            torch.testing.assert_close(
                of_share.double(), exact, rtol=0, atol=4e-4
            )  # K * 2**-24 of terms that add up to 1


@pytest.mark.parametrize("spec", [MINIMAX, DEEPSEEK_V3], ids=["minimax-m2", "deepseek-v3"])
def test_rows_that_are_apart_or_do_not_start_at_16_bytes(spec: RouterSpec) -> None:
    """The contract; not the same bits, since cuBLAS may multiply such bfloat16 matrices in another way."""
    weight, hidden, size = random_weight(spec), random_hidden(spec, 300), spec.hidden_size
    for columns, first in ((8, 0), (1, 1)):
        wide = torch.full((256, size + columns), torch.nan, device="cuda", dtype=weight.dtype)
        rows = wide[:, first : first + size].copy_(weight)
        wide_hidden = torch.full((300, size + columns), torch.nan, device="cuda", dtype=hidden.dtype)
        hidden_rows = wide_hidden[:, first : first + size].copy_(hidden)
        for frozen in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a copy in every call
                routing = run(gate_on_gpu(spec, weight=rows, frozen=frozen), hidden_rows)
            assert problems_of(routing, hidden, weight, spec, tensors_of(spec)) == []


@pytest.mark.parametrize("rows", [300, 1100, 4000])
@pytest.mark.parametrize("spec", [MINIMAX, DEEPSEEK_V3], ids=["minimax-m2", "deepseek-v3"])
def test_the_product_by_itself_has_the_bits_of_the_gate(spec: RouterSpec, rows: int) -> None:
    weight, hidden = random_weight(spec), random_hidden(spec, rows)
    expected = run(gate_on_gpu(spec, weight=weight), hidden).logits
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
@pytest.mark.parametrize("name", ["minimax-m2", "input norm"])
def test_other_hidden_states_take_the_plain_product_and_it_is_said(name: str, hidden_dtype: torch.dtype) -> None:
    spec = SHAPES[name]
    hidden, gate = random_hidden(spec, 300, hidden_dtype), gate_on_gpu(spec)
    warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"cuBLAS takes hidden states in bfloat16, .*{str(hidden_dtype)[6:]}"):
        routing = run(gate, hidden)
    assert problems_of(routing, hidden, gate.weight, spec, tensors_of(spec)) == []
    if spec.input_norm_eps is None:
        warn_once.cache_clear()
        with pytest.warns(RuntimeWarning, match="cuBLAS takes hidden states in bfloat16"):
            logits = moegate.router_gemm(hidden, gate.weight)
        assert routing.logits is not None
        assert logits.equal(routing.logits)


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
    weight, tensors = check_gate(gate._given(), MINIMAX)
    got = CudaBackend().route(hidden, weight, MINIMAX, tensors, None, None)
    assert_same_bits(got, run(gate, hidden))
