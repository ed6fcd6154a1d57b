"""docs/contract.md, section 1: logits."""

from __future__ import annotations

from dataclasses import replace

import on_device
import pytest
import torch
from on_device import back, gate_there, route, router_gemm, there
from routers import SPECS, generator, tensors_of, with_bfloat16_logits
from torch import Tensor

from moegate import RouterSpec
from moegate.contract import bounds
from moegate.contract.reference import router_logits
from moegate.contract.verify import verify_logits
from moegate.gemm import torch_mm
from moegate.gemm.cpu_packed import pack
from moegate.routing import RouterTensors

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [
    (0, 64, 8),
    (1, 7168, 256),
    (3, 640, 7),
    (8, 2880, 32),
    (17, 1000, 258),
    (64, 2048, 60),
    (65, 8, 1),
    (2, 1, 3),
]


def draw(shape: tuple[int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    m, k, n = shape
    g = generator(seed)
    return torch.randn(m, k, generator=g), torch.randn(n, k, generator=g) * k**-0.5


def gemm_case(
    shape: tuple[int, int, int], hidden_dtype: torch.dtype, weight_dtype: torch.dtype, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, RouterSpec, list[Tensor | None]]:
    """Hidden states, a weight, their spec, and the biases to try."""
    hidden, weight = (part.to(dtype) for part, dtype in zip(draw(shape), (hidden_dtype, weight_dtype), strict=True))
    bias = torch.randn(shape[2], generator=generator(1))
    spec = RouterSpec(shape[1], shape[2], 1)
    return (
        hidden,
        weight,
        with_bfloat16_logits(spec) if out_dtype == torch.bfloat16 else spec,
        [None, bias, bias.bfloat16()],
    )


@pytest.mark.parametrize("tokens", [3, 2000])
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hidden_dtype", FLOATS, ids=str)
def test_autocast_changes_nothing(hidden_dtype: torch.dtype, weight_dtype: torch.dtype, tokens: int) -> None:
    spec = RouterSpec(640, 24, 4, renormalize=True)
    hidden, weight = draw((tokens, 640, 24))
    hidden, weight = hidden.to(hidden_dtype), weight.to(weight_dtype)
    expected = route(hidden, weight, spec, return_logits=True)
    gate = gate_there(spec, weight, frozen=True)
    with torch.autocast(on_device.DEVICE.type, torch.bfloat16):
        got = route(hidden, weight, spec, return_logits=True)
        of_gate = back(gate(there(hidden), return_logits=True))
        logits = router_gemm(hidden, weight)
    for routing in (got, of_gate):
        assert routing.logits is not None
        assert verify_logits(routing.logits, hidden, weight, spec, RouterTensors()).problems == []
    for part, other in zip(got[:3], expected[:3], strict=True):
        assert part is not None
        assert other is not None
        assert part.dtype == other.dtype
        assert part.equal(other)
    assert verify_logits(logits, hidden, weight, spec, RouterTensors()).problems == []


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hidden_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_are_within_the_bound(
    shape: tuple[int, int, int], hidden_dtype: torch.dtype, weight_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    hidden, weight, spec, biases = gemm_case(shape, hidden_dtype, weight_dtype, out_dtype)
    for given in biases:
        logits = router_gemm(hidden, weight, given, out_dtype=out_dtype)
        assert verify_logits(logits, hidden, weight, spec, RouterTensors(bias=given)).problems == []


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("of_hidden", "of_weight"), [(1e37, 1e-37), (1e30, 1e-36), (1e28, 1e-28), (1e-28, 1e28)])
def test_float32_factors_at_the_ends_of_their_range(
    of_hidden: float, of_weight: float, hidden_dtype: torch.dtype
) -> None:
    """Where three bfloat16 terms no longer add up to the float32 number, the bound has a summand for the loss."""
    hidden, weight = draw((9, 640, 33), seed=3)
    hidden, weight = (hidden * of_hidden).to(hidden_dtype), weight * of_weight
    logits = router_gemm(hidden, weight)
    assert verify_logits(logits, hidden, weight, RouterSpec(640, 33, 1), RouterTensors()).problems == []
    bound = bounds.logit_bound(hidden, weight, logits.double(), RouterSpec(640, 33, 1), RouterTensors())
    assert bool(bound.isfinite().all())  # otherwise nothing could break the bound


@pytest.mark.cpu
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("hidden_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_of_a_prepared_weight_are_within_the_bound(
    shape: tuple[int, int, int], hidden_dtype: torch.dtype, weight_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    hidden, weight, spec, biases = gemm_case(shape, hidden_dtype, weight_dtype, out_dtype)
    for given in biases:
        packed = pack(weight, torch_mm.dtype_of_gemm(weight.dtype, weight.dtype, None, out_dtype))
        logits = torch_mm.router_gemm(hidden, weight, given, out_dtype, packed)
        assert verify_logits(logits, hidden, weight, spec, RouterTensors(bias=given)).problems == []


def test_the_bound_is_that_of_float32() -> None:
    """Rounding the operands to bfloat16 or to TF32 breaks the bound."""
    hidden, weight = draw((8, 7168, 256))
    spec = RouterSpec(7168, 256, 8)
    exact = router_logits(hidden, weight, spec, RouterTensors())
    assert (exact.float() - exact).abs().amax() < bounds.logit_bound(
        hidden, weight, exact, spec, RouterTensors()
    ).amin()
    rounded = router_logits(hidden.bfloat16(), weight, spec, RouterTensors())
    assert verify_logits(rounded.float(), hidden, weight, spec, RouterTensors()).problems
    tf32 = (weight.view(torch.int32) & ~0x1FFF).view(torch.float32)
    truncated = router_logits(hidden, tf32, spec, RouterTensors())
    assert verify_logits(truncated.float(), hidden, weight, spec, RouterTensors()).problems


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_logits_keep_the_bound_at_any_precision(precision: str) -> None:
    """PyTorch's settings that permit a faster, coarser GEMM change nothing."""
    hidden, weight = draw((8, 7168, 256))
    torch.set_float32_matmul_precision(precision)
    try:
        logits = router_gemm(hidden, weight)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert verify_logits(logits, hidden, weight, RouterSpec(7168, 256, 8), RouterTensors()).problems == []


@pytest.mark.cpu
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_reduced_precision_is_not_used(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = draw((8, 2048, 16))
    seen = []
    linear = torch_mm._linear_as_allowed

    def watched(*args: object) -> Tensor:
        seen.append(torch_mm._allows_less_than_float32(is_cuda=False))
        return linear(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch_mm, "_linear_as_allowed", watched)
    for by_device in (True, False):
        monkeypatch.setattr(torch_mm, "_HAS_SETTING_BY_DEVICE", by_device and torch_mm._HAS_SETTING_BY_DEVICE)
        torch.set_float32_matmul_precision(precision)
        try:
            router_gemm(hidden, weight)
            assert torch_mm._allows_less_than_float32(is_cuda=False), "the user's setting is kept"
        finally:
            torch.set_float32_matmul_precision("highest")
    assert seen == [False, False]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_input_norm(dtype: torch.dtype) -> None:
    spec = SPECS["input norm and expert scale"]
    tensors = tensors_of(spec)
    hidden, weight = (part.to(dtype) for part in draw((9, spec.hidden_size, spec.num_gate_rows)))
    hidden[3] *= 1000
    hidden[4] = 0  # the norm depends on eps alone
    arguments = {name: value for name, value in tensors._asdict().items() if value is not None}
    for candidate in (spec, with_bfloat16_logits(spec)):
        routing = route(hidden, weight, candidate, **arguments, return_logits=True)
        assert routing.logits is not None
        assert verify_logits(routing.logits, hidden, weight, candidate, tensors).problems == []
    assert routing.logits is not None
    unscaled = tensors._replace(input_scale=torch.ones(spec.hidden_size))
    assert verify_logits(routing.logits, hidden, weight, candidate, unscaled).problems


def test_a_scaled_weight_beyond_the_range_of_its_parts_has_no_bound() -> None:
    spec = SPECS["input norm and expert scale"]
    hidden, weight = draw((9, spec.hidden_size, spec.num_gate_rows))
    exact, tensors = torch.zeros(9, spec.num_gate_rows, dtype=torch.float64), tensors_of(spec)
    assert tensors.input_scale is not None
    weight[3, 5], tensors.input_scale[5], hidden[:, 5] = 2.0**100, 2.0**28, 0.0  # nothing else is large
    bound = bounds.logit_bound(hidden, weight, exact, spec, tensors)
    assert bound.isinf().all(dim=0).nonzero().flatten().tolist() == [3]
    assert bound[:, :3].isfinite().all()


def test_bfloat16_logits_are_rounded_once() -> None:
    """Rounded once with the bias: rounding before and after adding the bias would be off by up to an ulp."""
    hidden, weight = (part.bfloat16() for part in draw((64, 2880, 128)))
    bias = (100 * torch.randn(128, generator=generator(2))).bfloat16()
    spec = RouterSpec(2880, 128, 4, logits_dtype="bfloat16", linear_bias=True)
    tensors = RouterTensors(bias=bias)
    logits = router_gemm(hidden, weight, bias, out_dtype=torch.bfloat16)
    assert verify_logits(logits, hidden, weight, spec, tensors).problems == []
    exact = router_logits(hidden, weight, replace(spec, logits_dtype="float32"), tensors)
    assert (logits != exact.bfloat16()).float().mean() < 0.01  # only where rounding is nearly a tie
    twice = router_gemm(hidden, weight, out_dtype=torch.bfloat16) + bias
    assert verify_logits(twice, hidden, weight, spec, tensors).problems
