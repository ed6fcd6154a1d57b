"""Every kernel compiles for every architecture without register spills; NVRTC needs no GPU."""

from __future__ import annotations

import itertools
import struct
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from _pytest.mark.structures import ParameterSet
from cuda_kernels import a_problem, dot_texts, gemm_texts, select_text
from routers import SPECS

from moegate import RouterSpec
from moegate.cuda import jit, text
from moegate.cuda.jit import compiler, module
from moegate.gemm import cublas, dot_gemm, router_gemm
from moegate.problem import Dtypes, Problem
from moegate.routing import PADDINGS
from moegate.selection import select_text as of_selection

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.skipif(jit.missing_compiler() is not None, reason=str(jit.missing_compiler())),
]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def known(*archs: str) -> list[ParameterSet]:
    """The architectures as test parameters, without those that an older NVRTC does not know."""

    def is_known(arch: str) -> bool:
        return int("".join(filter(str.isdigit, arch))) in jit.known_archs()

    return [pytest.param(arch, marks=pytest.mark.skipif(not is_known(arch), reason="an older NVRTC")) for arch in archs]


MAIN_ARCHS = known("sm_80", "sm_90a", "sm_120a")
OTHER_ARCHS = known("sm_86", "sm_87", "sm_89", "sm_100a", "sm_103a", "sm_110a", "sm_121a", "compute_80", "compute_90")


class GemmCase(NamedTuple):
    hidden_size: int
    rows: int
    hidden_dtype: torch.dtype = BF16
    weight_dtype: torch.dtype = BF16
    logits_dtype: torch.dtype = FP32
    has_bias: bool = False
    norm_eps: float | None = None


# GEMMs of every shape of tile, for every architecture.
SHAPES = [
    GemmCase(7168, 256),
    GemmCase(2048, 128, FP16, FP16),
    GemmCase(2880, 32, logits_dtype=BF16, has_bias=True),
    GemmCase(3072, 256, weight_dtype=FP32),
    GemmCase(1000, 258),
    GemmCase(7168, 896),
    GemmCase(2816, 128, norm_eps=1e-6),
]
PAIRS = [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP32), (FP16, BF16)]
ALL_GEMMS = [
    *SHAPES,
    *(GemmCase(k, r, *pair) for k, r in ((7168, 256), (2048, 128), (1000, 258)) for pair in PAIRS),
    *(GemmCase(2880, 32, *pair, has_bias=True) for pair in PAIRS[:3]),
    GemmCase(3072, 256, FP32, FP32),
    GemmCase(3072, 256, FP16, FP32),
    GemmCase(2816, 128, FP32, FP32, norm_eps=1e-6),
]


def problems_of(text: str, arch: str, what: object) -> list[str]:
    """Compiles; prints the registers, and returns the spills that ptxas reports."""
    if arch.startswith("compute"):
        assert b".entry" in compiler._compile(text, arch).code  # PTX has no register allocation
        return []
    uses = jit.kernel_uses(text, arch)
    assert uses
    for use in uses:
        print(f"{arch} {use.name}: {use.registers} registers, {what}")
    return [f"{arch} {use.name}, {what}: {use}" for use in uses if use.memory_bytes]


def problem_of(case: GemmCase, *, frozen: bool = False) -> Problem:
    spec = RouterSpec(
        case.hidden_size,
        case.rows,
        1,
        linear_bias=case.has_bias,
        input_norm_eps=case.norm_eps,
        logits_dtype="float32" if case.logits_dtype == FP32 else "bfloat16",
    )
    bias_dtype = case.weight_dtype if case.has_bias else None
    scale_dtype = None if case.norm_eps is None else case.weight_dtype
    dtypes = Dtypes(case.hidden_dtype, case.weight_dtype, bias_dtype, scale_dtype)
    return a_problem(spec, dtypes, frozen=frozen)


def gemm_problems(arch: str, case: GemmCase, *, frozen: bool) -> list[str]:
    texts = gemm_texts(arch, problem_of(case, frozen=frozen))
    return [problem for text in texts for problem in problems_of(text, arch, f"{case}, frozen={frozen}")]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_gemms_do_not_spill(arch: str, frozen: bool) -> None:
    problems = [problem for case in dict.fromkeys(ALL_GEMMS) for problem in gemm_problems(arch, case, frozen=frozen)]
    assert problems == []


@pytest.mark.parametrize("arch", OTHER_ARCHS)
def test_gemms_do_not_spill_on_other_chips(arch: str) -> None:
    problems = [problem for at, case in enumerate(SHAPES) for problem in gemm_problems(arch, case, frozen=at % 2 == 0)]
    assert problems == []


# Each number of rows to a block, of vectors to a thread and of warps; and the most registers.
DOT_PRODUCTS = [
    GemmCase(8192, 256, weight_dtype=FP32),
    GemmCase(3072, 256, weight_dtype=FP32, logits_dtype=BF16, has_bias=True),
    GemmCase(6144, 128, FP32, FP32),
    GemmCase(16384, 258, FP32, FP32),
    GemmCase(8192, 1024, FP32, FP32),
    GemmCase(4096, 1022, FP16, FP32, has_bias=True),
    GemmCase(1000, 1022, FP32, FP32, has_bias=True),
    GemmCase(8, 1, weight_dtype=FP32),
]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("arch", [*MAIN_ARCHS, *OTHER_ARCHS])
def test_dot_products_do_not_spill(arch: str, frozen: bool) -> None:
    problems = [
        problem
        for case in DOT_PRODUCTS
        for text in dot_texts(arch, problem_of(case, frozen=frozen))
        for problem in problems_of(text, arch, f"{case}, frozen={frozen}")
    ]
    assert problems == []


AROUND_CUBLAS = [
    GemmCase(3072, 256, weight_dtype=FP32),
    GemmCase(1000, 33, weight_dtype=FP32),
    GemmCase(2048, 60, FP16, FP16),
    GemmCase(6144, 258),
    GemmCase(2816, 128, norm_eps=1e-6),
    GemmCase(1000, 33, weight_dtype=FP32, norm_eps=1e-6),
    GemmCase(2880, 33, logits_dtype=BF16, has_bias=True),
]


@pytest.mark.parametrize("arch", [*MAIN_ARCHS, *OTHER_ARCHS])
def test_what_is_around_cublas_does_not_spill(arch: str) -> None:
    cases = [problem_of(case) for case in AROUND_CUBLAS]
    texts = [*map(cublas.prepare_source, cases), *map(cublas.reduce_source, cases)]
    assert [problem for at, text in enumerate(texts) for problem in problems_of(text, arch, at)] == []


@pytest.mark.parametrize("arch", [*MAIN_ARCHS, *OTHER_ARCHS])
def test_selections_do_not_spill(arch: str) -> None:
    paddings = itertools.cycle((None, *PADDINGS))
    problems = [
        problem
        for (name, spec), padding in zip(SPECS.items(), paddings, strict=False)
        for problem in problems_of(select_text(spec, padding=padding), arch, name)
    ]
    assert problems == []


@pytest.mark.parametrize("num_terms", [1, 2, 3])
@pytest.mark.parametrize("arch", [*MAIN_ARCHS, *OTHER_ARCHS])
def test_selections_that_make_the_logits_do_not_spill(arch: str, num_terms: int) -> None:
    """Alternates between loads of four and of one, except for the largest selection, which has the most registers."""
    problems = [
        problem
        for at, (name, spec) in enumerate(SPECS.items())
        if num_terms != 2 or spec.input_norm_eps is not None  # two terms occur for scaled weights only
        for aligned in ((True, False) if name == "largest" else (at % 2 == 0,))
        for problem in problems_of(select_text(spec, aligned=aligned, num_terms=num_terms), arch, name)
    ]
    assert problems == []


@pytest.mark.parametrize("arch", MAIN_ARCHS)
def test_selections_that_read_one_logit_at_a_time_do_not_spill(arch: str) -> None:
    problems = [
        problem
        for name, spec in SPECS.items()
        for problem in problems_of(select_text(spec, aligned=False, frozen=True), arch, name)
    ]
    assert problems == []


@pytest.mark.parametrize(
    ("capability", "archs", "expected"),
    [
        ((8, 9), {80, 89, 90}, "sm_89"),
        ((9, 0), {80, 90, 100}, "sm_90a"),
        ((10, 3), {90, 100, 103}, "sm_103a"),
        ((10, 3), {90, 100, 101, 120}, "compute_90"),  # as of NVRTC 12.8
        ((13, 0), {90, 100, 130}, "compute_90"),  # an architecture that this package does not know
    ],
)
def test_a_chip_gets_its_own_code_or_what_every_later_one_runs(
    capability: tuple[int, int], archs: set[int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "known_archs", lambda: frozenset(archs))
    assert jit.arch_of(capability) == expected


@pytest.mark.parametrize(
    ("arguments", "header"),
    [
        ((router_gemm.ARGUMENTS,), "router_gemm.cuh"),
        ((dot_gemm.ARGUMENTS,), "dot_gemm.cuh"),
        ((of_selection.ARGUMENTS,), "select.cuh"),
        ((cublas.PREPARE_ARGUMENTS, cublas.REDUCE_ARGUMENTS), "split_k.cuh"),
    ],
)
def test_arguments_are_packed_as_the_kernel_has_them(arguments: tuple[text.Arguments, ...], header: str) -> None:
    sizes = (f"static_assert(sizeof({each.name}) == {struct.calcsize(each.format)});\n" for each in arguments)
    unit = text.translation_unit(header, arguments, "", *sizes, "__global__ void nothing() {}\n")
    assert compiler._compile(unit, "sm_90a").code


# E, n_group, k: the fewest experts for such a k, in groups of whole lanes and others.
SMALL_PER_GROUP = [(32, 32, 32), (64, 2, 32), (31, 31, 31), (30, 2, 30), (9, 3, 9), (2, 2, 2)]


def test_a_warp_has_just_the_shared_memory_that_its_selection_uses() -> None:
    """select.cuh asserts that the shared memory suffices; this test, that it is no more, rounded up to 4 bytes."""
    small = [RouterSpec(8, e, k, n_group=n, topk_group=n, select_per_group=True) for e, n, k in SMALL_PER_GROUP]
    for spec in (*SPECS.values(), *small):
        unit = f"{select_text(spec)}static_assert(Select<With<0>>::kEnd + 4 > {of_selection.shared_words(spec)});\n"
        assert compiler._compile(unit, "compute_90").code


@pytest.mark.parametrize("name", ["softmax in groups by top2_sum", "sigmoid with bias in groups"])
def test_a_sum_of_two_keys_is_the_kernel_of_top2_sum(name: str) -> None:
    by_two = replace(SPECS[name], group_score="topj_sum", group_score_top_j=2)
    assert select_text(by_two) == select_text(SPECS[name])
    assert select_text(replace(by_two, group_score_top_j=3)) != select_text(SPECS[name])


def test_what_the_compiler_knows_compiles() -> None:
    for number in (arch for arch in jit.known_archs() if arch >= 80):
        assert compiler._compile("__global__ void nothing() {}", f"sm_{number}").code
