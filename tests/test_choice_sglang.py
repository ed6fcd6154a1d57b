"""`policy="sglang"`: every branch of the rule, over every chip, shape, dtype and FlashInfer."""

from __future__ import annotations

import itertools

import pytest
import torch
from machines import described
from packaging.version import Version

from moegate import RouterSpec, get_spec
from moegate.choice.explain import explain
from moegate.choice.plan import Plan
from moegate.problem import problem_of

CHIPS = (80, 89, 90, 100, 103, 110, 120, 121)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLASHINFER = {None: "absent", "0.5.2": "too old for any", "0.6.7": "too old for sm_103", "0.6.8": "", "0.7.2.post1": ""}
FIRST = {100: Version("0.5.3"), 103: Version("0.6.8")}


def wanted(sm: int, tokens: int, k: int, n: int, dtype: torch.dtype, flashinfer: str | None) -> tuple[str, str]:
    """The table of docs/choice.md as code, independent of the package's."""
    backend, kernel = "torch", "mm+ops"
    if sm >= 90 and (k, n) in ((7168, 256), (7168, 384)) and tokens in range(1, 17) and dtype == torch.bfloat16:
        backend, kernel = "cuda", "router_gemm+select"
        if n == 256 and sm in FIRST and flashinfer is not None and Version(flashinfer) >= FIRST[sm]:
            backend, kernel = "flashinfer", "mm_M1_16_K7168_N256"
    return backend, kernel


@pytest.mark.parametrize("flashinfer", FLASHINFER, ids=str)
@pytest.mark.parametrize("sm", CHIPS)
def test_every_branch(sm: int, flashinfer: str | None) -> None:
    seen = set()
    for k, n, dtype in itertools.product((7168, 6144, 7160), (256, 384, 128), DTYPES):
        spec = RouterSpec(hidden_size=k, num_experts=n, top_k=8, scoring_func="sigmoid")
        plan = Plan(problem_of(described(f"sm_{sm}", flashinfer), spec, dtype), "sglang")
        for tokens in range(18):
            candidate = plan.choice(tokens).candidate
            got = candidate.backend, candidate.kernel_of(plan.problem)
            assert got == wanted(sm, tokens, k, n, dtype, flashinfer), (sm, tokens, k, n, dtype, flashinfer)
            seen.add(got[0])
    expected = {"torch"} | ({"cuda"} if sm >= 90 else set())
    if sm in FIRST and flashinfer is not None and Version(flashinfer) >= FIRST[sm]:
        expected.add("flashinfer")
    assert seen == expected


@pytest.mark.parametrize(
    ("sm", "flashinfer", "tokens", "note"),
    [
        (103, None, 1, "FlashInfer is not installed"),
        (103, "0.6.7.post3", 16, "FlashInfer 0.6.7.post3 is too old, mm_M1_16_K7168_N256 for sm_103 needs 0.6.8"),
        (100, "nonsense", 1, "'nonsense' is none that can be compared"),
    ],
)
def test_explain_says_why_the_rules_own_choice_does_not_run(
    sm: int, flashinfer: str | None, tokens: int, note: str
) -> None:
    plan = Plan(problem_of(described(f"sm_{sm}", flashinfer), get_spec("deepseek-v3"), torch.bfloat16), "sglang")
    explanation = explain(plan, tokens)
    assert explanation.backend == "cuda"
    assert explanation.notes[0].startswith("row 1 asks for mm_M1_16_K7168_N256: ")
    assert note in explanation.notes[0]
    assert explanation.why.startswith("row 2")


@pytest.mark.parametrize(("tokens", "dtype", "what"), [(0, torch.bfloat16, "M = 0"), (1, torch.float16, "float16")])
def test_explain_says_where_the_rule_is_silent(tokens: int, dtype: torch.dtype, what: str) -> None:
    plan = Plan(problem_of(described("sm_103", "0.6.8"), get_spec("deepseek-v3"), dtype), "sglang")
    explanation = explain(plan, tokens)
    assert (explanation.backend, explanation.why.partition(":")[0]) == ("torch", "row 3")
    assert what in explanation.why


def test_a_dtype_of_a_call_counts_and_not_that_of_the_gate() -> None:
    plan = Plan(problem_of(described("sm_103", "0.6.8"), get_spec("deepseek-v3"), torch.bfloat16), "sglang")
    assert plan.choice(4).candidate.backend == "flashinfer"
    assert plan.choice(4, plan.problem.given(torch.float32, None)).candidate.backend == "torch"


def test_a_spec_whose_logits_flashinfer_cannot_write_takes_the_next_row() -> None:
    spec = RouterSpec(hidden_size=7168, num_experts=256, top_k=8, logits_dtype="bfloat16")
    explanation = explain(Plan(problem_of(described("sm_103", "0.6.8"), spec, torch.bfloat16), "sglang"), 1)
    assert explanation.backend == "cuda"
    assert "bfloat16 logits" in explanation.notes[0]


@pytest.mark.parametrize("sm", [90, 110, 120])
def test_row_2_is_no_makeshift_where_row_1_does_not_hold(sm: int) -> None:
    plan = Plan(problem_of(described(f"sm_{sm}", "0.7.2"), get_spec("deepseek-v3"), torch.bfloat16), "sglang")
    explanation = explain(plan, 1)
    assert explanation.why == "row 2: ours in the place of dsv3_router_gemm"
    assert explanation.notes == ()
