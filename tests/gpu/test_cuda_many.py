"""Many tokens: the GEMMs of cuBLAS, also with the terms of a float32 weight, and the logits made of partial sums."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from cuda_kernels import (
    DEEPSEEK_V3,
    a_call,
    assert_same_bits,
    bound_cublas,
    copy_of,
    gate_on_gpu,
    on_gpu,
    problems_of,
    random_hidden,
    random_weight,
    routed_by,
    run,
    selected,
)
from machines import router_gemm_up_to
from routers import SPECS, tensors_of, token_ids, with_bfloat16_logits

import moegate
from moegate import RouterSpec
from moegate.arguments import check_gate
from moegate.choice.candidates import CUBLAS
from moegate.gemm.cublas import BoundCublas
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
def cublas_beyond_64() -> Iterator[None]:
    with router_gemm_up_to(64):
        yield


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_every_spec(name: str, weight_dtype: torch.dtype) -> None:
    """The routing keeps the contract, and equals that of the selection alone on the same logits."""
    spec = ALL[name]
    tensors, ids = on_gpu(tensors_of(spec)), token_ids(65).cuda() if spec.hash_routing else None
    for hidden_dtype in (torch.bfloat16, torch.float16):  # float16 is no operand for terms in bfloat16
        hidden = random_hidden(spec, 65, hidden_dtype)
        for frozen in (False, True):
            gate = gate_on_gpu(spec, weight_dtype, frozen=frozen)
            routing = run(gate, hidden)
            assert problems_of(routing, hidden, gate.weight, spec, tensors_of(spec)) == []
            assert routing.logits is not None
            assert_same_bits(routing, selected(routing.logits, spec, tensors, ids))


def test_float16() -> None:
    spec = with_bfloat16_logits(SPECS["softmax of selected"])
    gate, hidden = gate_on_gpu(spec, torch.float16), random_hidden(spec, 300, torch.float16)
    assert problems_of(run(gate, hidden), hidden, gate.weight, spec, tensors_of(spec)) == []


@pytest.mark.parametrize("rows", [65, 257, 3000])
@pytest.mark.parametrize("name", SHAPES)
def test_the_contract_is_kept(name: str, rows: int) -> None:
    spec = SHAPES[name]
    hidden = random_hidden(spec, rows)
    not_frozen, frozen = (gate_on_gpu(spec, torch.float32, frozen=frozen) for frozen in (False, True))
    expected = run(not_frozen, hidden)
    assert problems_of(expected, hidden, not_frozen.weight, spec, tensors_of(spec)) == []
    for gate in (frozen, gate_on_gpu(spec, torch.float32, pdl=False)):
        gemm, _ = gate._notice()[0].dispatch._at("both", rows, hidden.dtype)
        assert isinstance(gemm, BoundCublas)
        assert_same_bits(run(gate, hidden), expected)
    out = copy_of(expected)
    for part in out:
        if part is not None:
            part.fill_(-1)
    assert_same_bits(not_frozen(hidden, return_logits=True, out=out), expected)


@pytest.mark.parametrize(("hidden_size", "rows"), [(3072, 256), (1000, 7), (8, 1), (64, 1024)])
def test_the_terms_of_a_weight_to_the_bit(hidden_size: int, rows: int) -> None:
    weight = torch.randn(rows, hidden_size, device="cuda")
    first = weight.bfloat16()
    second = (weight - first.float()).bfloat16()
    third = (weight - first.float() - second.float()).bfloat16()
    assert weight.equal(first.float() + (second.float() + third.float()))
    spec = RouterSpec(hidden_size, rows, 1)
    bound = bound_cublas(spec, weight)
    assert bound._prepare is not None
    terms, factors = bound._prepared(bound._prepare, a_call(random_hidden(spec, 1), weight))
    assert factors is None
    assert len(terms) == -(-3 * rows // 8) * 8
    assert terms[: 3 * rows].equal(torch.cat([first, second, third]))
    assert not terms[3 * rows :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("hidden_size", "rows"), [(6144, 258), (2048, 60), (1000, 7), (8, 1)])
def test_rows_of_zeros_where_their_number_is_no_multiple_of_8(hidden_size: int, rows: int, dtype: torch.dtype) -> None:
    wide = torch.randn(rows, hidden_size + 8, device="cuda").to(dtype)
    for weight in (wide[:, :hidden_size].contiguous(), wide[:, :hidden_size]):
        bound = bound_cublas(RouterSpec(hidden_size, rows, 1), weight)
        for tokens in (65, 2000):
            hidden = torch.randn(tokens, hidden_size, device="cuda").to(dtype)
            sums, _ = bound.partial_sums(a_call(hidden, weight))
            assert sums.shape[2] % 8 == 0
            assert not sums[:, :, rows:].any()
            exact = hidden.double() @ weight.double().t()
            magnitude = hidden.double().abs() @ weight.double().abs().t()
            allowed = 4 * hidden_size**0.5 * 2.0**-24 * magnitude  # contract 1.1
            assert ((sums[:, :, :rows].double().sum(0) - exact).abs() <= allowed).all()


@pytest.mark.parametrize("rows", [65, 300, 700, 8000])
def test_splits_of_k(rows: int) -> None:
    """Each split is the sum over its slice of K, also for hidden states whose rows are apart."""
    weight, hidden = random_weight(DEEPSEEK_V3), random_hidden(DEEPSEEK_V3, rows)
    apart = torch.full((rows, 7168 + 8), torch.nan, dtype=torch.bfloat16, device="cuda")[:, :7168].copy_(hidden)
    bound = bound_cublas(DEEPSEEK_V3, weight)
    for given in (hidden, apart):
        sums, _ = bound.partial_sums(a_call(given, weight))
        assert (sums.shape[0] > 1) == (rows <= 700)  # with 78 to 200 multiprocessors
        step = 7168 // sums.shape[0]
        for split, of_split in enumerate(sums):
            part = slice(split * step, (split + 1) * step)
            exact = hidden[:, part].double() @ weight[:, part].double().t()
            torch.testing.assert_close(
                of_split.double(), exact, rtol=0, atol=4e-4
            )  # K * 2**-24 of terms that add up to 1


@pytest.mark.parametrize("spec", [MINIMAX, DEEPSEEK_V3], ids=["minimax-m2", "deepseek-v3"])
def test_rows_that_are_apart_or_do_not_start_at_16_bytes(spec: RouterSpec) -> None:
    """The contract is kept; bits may differ, since cuBLAS may use another kernel for such bfloat16 matrices."""
    weight, hidden, size = random_weight(spec), random_hidden(spec, 300), spec.hidden_size
    for columns, first in ((8, 0), (1, 1)):
        wide = torch.full((256, size + columns), torch.nan, device="cuda", dtype=weight.dtype)
        rows = wide[:, first : first + size].copy_(weight)
        wide_hidden = torch.full((300, size + columns), torch.nan, device="cuda", dtype=hidden.dtype)
        hidden_rows = wide_hidden[:, first : first + size].copy_(hidden)
        for frozen in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the warning of a copy in every call
                routing = run(gate_on_gpu(spec, weight=rows, frozen=frozen), hidden_rows)
            assert problems_of(routing, hidden, weight, spec, tensors_of(spec)) == []


@pytest.mark.parametrize("rows", [300, 1100, 4000])
@pytest.mark.parametrize("spec", [MINIMAX, DEEPSEEK_V3], ids=["minimax-m2", "deepseek-v3"])
def test_the_gemm_by_itself_has_the_bits_of_the_gate(spec: RouterSpec, rows: int) -> None:
    weight, hidden = random_weight(spec), random_hidden(spec, rows)
    expected = run(gate_on_gpu(spec, weight=weight), hidden).logits
    assert expected is not None
    assert moegate.router_gemm(hidden, weight).equal(expected)


def test_weights_of_all_magnitudes() -> None:
    """Weights whose terms are far smaller than those of their neighbours."""
    spec = SHAPES["minimax-m2"]
    hidden = random_hidden(spec, 300)
    gate = gate_on_gpu(spec, frozen=False)
    with torch.no_grad():
        gate.weight.mul_(torch.logspace(-12, 6, spec.hidden_size, device="cuda"))
        gate.weight[::3] *= -1e-20
    assert problems_of(run(gate, hidden), hidden, gate.weight, spec, tensors_of(spec)) == []


@pytest.mark.parametrize("hidden_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["minimax-m2", "input norm"])
def test_hidden_states_of_another_dtype_use_the_plain_gemm_with_a_warning(name: str, hidden_dtype: torch.dtype) -> None:
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


def test_without_a_gate() -> None:
    hidden, gate = random_hidden(MINIMAX, 100), gate_on_gpu(MINIMAX)
    weight, tensors = check_gate(gate._given(), MINIMAX)
    got = routed_by(CUBLAS, hidden, weight, MINIMAX, tensors)
    assert_same_bits(got, run(gate, hidden))
