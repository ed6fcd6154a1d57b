"""The packed weight of a frozen gate on a CPU: logits keep the bound."""

from __future__ import annotations

import pytest
import torch
from routers import generator
from torch import Tensor

from moegate import Gate, RouterSpec
from moegate.contract.verify import verify_logits
from moegate.gemm.cpu_packed import PackedWeight, pack
from moegate.routing import RouterTensors

pytestmark = pytest.mark.cpu  # the cuda backend packs no weight

SPEC = RouterSpec(640, 32, 4)
HAS_FLOAT16_PRODUCT = "fbgemm" in torch.backends.quantized.supported_engines


def weights() -> dict[str, Tensor]:
    normal = torch.randn(32, 640, generator=generator(0))
    one_small_row = normal.clone()
    one_small_row[3] *= 2.0**-60
    return {
        "normal": normal * 0.02,
        "tiny": normal * 2.0**-100,
        "large": normal * 2.0**60,
        "one small row": one_small_row,
        "zero": torch.zeros(32, 640),
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", weights())
def test_logits_of_a_prepared_weight(name: str, dtype: torch.dtype) -> None:
    """Logits are within the bound, also of rows with small elements, whose bound is small."""
    weight = weights()[name].to(dtype)
    gate = Gate(SPEC, weight, frozen=True)
    for rows in (1, 8, 9):
        hidden = torch.randn(rows, 640, generator=generator(1)).to(dtype)
        logits = gate(hidden, return_logits=True).logits
        assert logits is not None
        if logits.isfinite().all():
            assert verify_logits(logits, hidden, weight, SPEC, RouterTensors()).problems == []
        else:
            assert name == "large"
            assert dtype == torch.float16  # the weight overflows in float16


@pytest.mark.parametrize(
    ("name", "fits"), [("normal", True), ("tiny", False), ("one small row", False), ("zero", False)]
)
def test_half_the_bytes_where_no_bit_is_lost(name: str, fits: bool) -> None:
    prepared = pack(weights()[name].bfloat16(), torch.float32)
    assert isinstance(prepared, PackedWeight)
    assert (prepared.half is not None) == (fits and HAS_FLOAT16_PRODUCT)


def test_float32_weights_are_kept_in_float32() -> None:
    prepared = pack(weights()["normal"], torch.float32)
    assert isinstance(prepared, PackedWeight)
    assert prepared.half is None
