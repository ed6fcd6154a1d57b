"""What `MoEGate.forward` of SGLang 0.5.23 runs, row by row, beside the policy "sglang", the rule of April 2026.

No GPU is needed: SGLang's own code decides, told that it is on a GPU, and its kernels are replaced by their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from machines import described
from sglang_layers import own_forward

from moegate import RouterSpec
from moegate.choice.plan import Plan
from moegate.problem import problem_of

TINY, CUBLAS, LINEAR, DETERMINISTIC = "tiny_gemm_bf16", "linear_bf16_fp32", "F.linear", "torch.mm"
PAGE = Path(__file__).parents[3] / "docs" / "choice.md"
BF16, F32 = torch.bfloat16, torch.float32


def what_runs(monkeypatch: pytest.MonkeyPatch, sm: int, k: int, n: int, dtype: torch.dtype, tokens: int) -> str:
    """The kernel that SGLang's code calls on a GPU of this SM."""
    from sglang.kernels.ops.gemm import bf16_fp32
    from sglang.srt.models import deepseek_v2
    from sglang.srt.models.deepseek_common import utils

    ran: list[str] = []

    def named(name: str) -> Any:
        def kernel(*_: Any, out_dtype: torch.dtype = F32, **__: Any) -> str:
            assert out_dtype == F32
            ran.append(name)
            return name

        return kernel

    for module in (utils, deepseek_v2):
        monkeypatch.setattr(module, "_is_cuda", True)
    monkeypatch.setattr(utils, "_device_sm", sm)
    monkeypatch.setattr(deepseek_v2, "tiny_gemm_bf16", named(TINY), raising=False)
    monkeypatch.setattr(bf16_fp32, "linear_bf16_fp32", named(CUBLAS))
    monkeypatch.setattr(deepseek_v2.F, "linear", named(LINEAR))
    monkeypatch.setattr(torch, "mm", named(DETERMINISTIC))
    own_forward(dtype, n_routed_experts=n, hidden_size=k, router_fp32=dtype == F32, tokens=tokens)
    (name,) = ran
    return name


def policy_runs(sm: int, k: int, n: int, dtype: torch.dtype, tokens: int) -> str:
    spec = RouterSpec(hidden_size=k, num_experts=n, top_k=8, scoring_func="sigmoid")
    choice = Plan(problem_of(described(f"sm_{sm}", "0.6.8"), spec, dtype), "sglang").choice(tokens)
    return choice.candidate.backend


# Of a GPU, K, N, the weight's dtype and M: what 0.5.23 runs, and which backend the policy does.
ROWS: list[tuple[int, int, int, torch.dtype, int, str, str]] = [
    (100, 7168, 256, BF16, 1, TINY, "flashinfer"),
    (100, 7168, 256, BF16, 16, TINY, "flashinfer"),
    (103, 7168, 256, BF16, 16, TINY, "flashinfer"),
    (90, 7168, 256, BF16, 1, TINY, "cuda"),
    (90, 7168, 256, BF16, 16, TINY, "cuda"),
    (90, 7168, 384, BF16, 16, TINY, "cuda"),
    (100, 7168, 384, BF16, 16, TINY, "cuda"),
    (120, 7168, 256, BF16, 16, TINY, "cuda"),
    (90, 7168, 256, BF16, 17, CUBLAS, "torch"),
    (100, 7168, 256, BF16, 17, CUBLAS, "torch"),
    (90, 6144, 256, BF16, 1, TINY, "torch"),
    (90, 7168, 128, BF16, 16, TINY, "torch"),
    (90, 4096, 256, BF16, 16, TINY, "torch"),
    (90, 7160, 256, BF16, 1, CUBLAS, "torch"),
    (90, 16896, 256, BF16, 1, CUBLAS, "torch"),
    (89, 7168, 256, BF16, 1, CUBLAS, "torch"),
    (80, 7168, 256, BF16, 16, CUBLAS, "torch"),
    (90, 7168, 256, F32, 1, LINEAR, "torch"),
    (100, 7168, 256, F32, 16, LINEAR, "torch"),
    (90, 7168, 256, torch.float16, 1, CUBLAS, "torch"),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(map(str, row[:5])))
def test_row(row: tuple[int, int, int, torch.dtype, int, str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    *case, theirs, ours = row
    assert policy_runs(*case) == ours  # type: ignore[arg-type]
    assert what_runs(monkeypatch, *case) == theirs  # type: ignore[arg-type]


def test_deterministic_inference_runs_one_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.runtime_context import get_context

    with get_context().override_server_args(enable_deterministic_inference=True):
        assert what_runs(monkeypatch, 90, 7168, 256, BF16, 1) == DETERMINISTIC


def test_the_page_names_the_kernels() -> None:
    """docs/choice.md's table of differences names each kernel that the rows above found, and the module it is in."""
    text = PAGE.read_text(encoding="utf-8").partition("What SGLang 0.5.23 runs instead")[2].partition("\n### ")[0]
    assert text
    for word in (
        TINY,
        CUBLAS,
        LINEAR,
        "torch.mm",
        "sglang.srt.models.deepseek_v2",
        "sglang.srt.models.deepseek_common.utils",
    ):
        assert word in text
