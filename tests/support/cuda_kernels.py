"""Helpers of the tests of the CUDA kernels: tilings for any chip, gates on a GPU, comparisons to the bit."""

from __future__ import annotations

from typing import Any

import torch
from routers import generator, tensors_of, token_ids
from torch import Tensor

from moegate import Gate, RouterSpec, Routing
from moegate.choice.candidates import Candidate
from moegate.choice.dispatch import Dispatch, Options, for_selection
from moegate.choice.machines import machine_of
from moegate.choice.plan import Plan
from moegate.contract.verify import verify_call
from moegate.cuda.device import Chip, described_chip
from moegate.gemm import dot_gemm, router_gemm
from moegate.gemm.cublas import BoundCublas
from moegate.halves import Call
from moegate.machine import Machine
from moegate.problem import Dtypes, Problem, dtypes_of
from moegate.routing import RouterTensors
from moegate.selection.select_text import select_text as select_text_of

# The fewest and the most multiprocessors of the GPUs of a compute capability, by NVIDIA's data sheets. The tiling of a
# GEMM depends on the number.
SMS = {
    80: (56, 108),  # A30, A100
    86: (16, 84),  # RTX 3050 laptop, RTX A6000
    87: (8, 16),  # Orin NX, AGX Orin
    89: (20, 142),  # RTX 4050 laptop, L40
    90: (78, 132),  # H20, H100 and H200
    100: (148, 148),  # B200
    103: (148, 160),  # B300
    110: (20, 20),  # Thor
    120: (20, 188),  # RTX 5050, RTX PRO 6000
    121: (48, 48),  # GB10
}
NO_TENSORS = RouterTensors()
DEEPSEEK_V3 = RouterSpec(
    7168, 256, 8, "sigmoid", "score", 8, 4, renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=2.5
)


def number_of(arch: str) -> int:
    """90 for sm_90a and compute_90."""
    return int("".join(filter(str.isdigit, arch)))


def chips_of(arch: str) -> list[Chip]:
    """The smallest and the largest chip of an architecture."""
    number = number_of(arch)
    return [described_chip(divmod(number, 10), num_sms) for num_sms in SMS[number]]


def a_problem(spec: RouterSpec, dtypes: Dtypes | None = None, *, frozen: bool = False) -> Problem:
    """On a GPU that is not here; by default with the dtypes of routers.tensors_of."""
    dtypes = dtypes or dtypes_of(spec, torch.bfloat16, tensors_of(spec))
    return Problem(Machine("a GPU", (9, 0), 132), spec, dtypes, frozen)


def gemm_texts(arch: str, problem: Problem) -> list[str]:
    """The source texts of a router GEMM, tiled for the smallest and the largest chip of an architecture."""
    texts = [router_gemm.source(problem, router_gemm.tiling_for(problem, chip)) for chip in chips_of(arch)]
    return list(dict.fromkeys(texts))


def dot_texts(arch: str, problem: Problem) -> list[str]:
    """The source texts of dot_gemm, tiled for the smallest and the largest chip of an architecture."""
    sizes = problem.spec.hidden_size, problem.spec.num_gate_rows
    return list(dict.fromkeys(dot_gemm.source(problem, dot_gemm.tiling_of(*sizes, chip)) for chip in chips_of(arch)))


def select_text(
    spec: RouterSpec,
    *,
    aligned: bool = True,
    frozen: bool = False,
    num_terms: int = 0,
    padding: torch.dtype | None = None,
) -> str:
    """The source text of a selection, with the dtypes of routers.tensors_of."""
    problem = a_problem(spec, frozen=frozen)
    problem = problem._replace(dtypes=problem.dtypes._replace(padding=padding))
    return select_text_of(problem, aligned=aligned, num_terms=num_terms)


def on_gpu(tensors: RouterTensors) -> RouterTensors:
    return RouterTensors(*(None if part is None else part.cuda() for part in tensors))


def random_weight(spec: RouterSpec, dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> Tensor:
    """[R, K] on the GPU, for logits with a standard deviation of 1."""
    if spec.weight_dtype == "float32":
        dtype = torch.float32
    weight = torch.randn(spec.num_gate_rows, spec.hidden_size, generator=generator(seed))
    weight *= spec.hidden_size**-0.5
    return weight.to("cuda", dtype)


def random_hidden(spec: RouterSpec, rows: int, dtype: torch.dtype = torch.bfloat16, seed: int = 4) -> Tensor:
    return torch.randn(rows, spec.hidden_size, generator=generator(seed)).to("cuda", dtype)


def gate_on_gpu(
    spec: RouterSpec, dtype: torch.dtype = torch.bfloat16, *, weight: Tensor | None = None, **given: Any
) -> Gate:
    """A gate with the tensors of routers.tensors_of and the given weight, or a random one."""
    tensors = on_gpu(tensors_of(spec))._asdict()
    return Gate(spec, random_weight(spec, dtype) if weight is None else weight, **tensors, **given)


def run(gate: Gate, hidden: Tensor, *, return_logits: bool = True) -> Routing:
    """The gate's routing; for hash routing, with the token ids of routers.token_ids."""
    ids = token_ids(len(hidden)).cuda() if gate.spec.hash_routing else None
    routing: Routing = gate(hidden, input_ids=ids, return_logits=return_logits)
    return routing


def problems_of(
    routing: Routing, hidden: Tensor, weight: Tensor, spec: RouterSpec, tensors: RouterTensors
) -> list[str]:
    """The breaches of the contract by a routing with logits."""
    ids = token_ids(len(hidden)) if spec.hash_routing else None
    return verify_call(routing, hidden, weight, spec, tensors, ids).problems


def selected(
    logits: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    input_ids: Tensor | None = None,
    padding: Tensor | None = None,
) -> Routing:
    """The routing of the selection alone for logits on the GPU, with these logits."""
    dispatch = for_selection(logits.device, spec, logits.dtype, tensors, Options(backend="cuda"))
    return dispatch.select(logits, tensors, input_ids, padding)


def routed_by(
    candidate: Candidate, hidden: Tensor, weight: Tensor, spec: RouterSpec, tensors: RouterTensors
) -> Routing:
    """The routing of a candidate for hidden states on the GPU, whatever a plan would choose."""
    problem = Problem(machine_of(weight.device), spec, dtypes_of(spec, weight.dtype, tensors), frozen=False)
    ids = token_ids(len(hidden)).cuda() if spec.hash_routing else None
    return Dispatch(Plan(problem), only=candidate).route(hidden, weight, tensors, ids, {})


def bound_cublas(spec: RouterSpec, weight: Tensor, tensors: RouterTensors = NO_TENSORS) -> BoundCublas:
    """The GEMM of cuBLAS with its kernels, bound for a weight on the GPU."""
    problem = Problem(machine_of(weight.device), spec, dtypes_of(spec, weight.dtype, tensors), frozen=False)
    return BoundCublas(problem, weight.device)


def a_call(hidden: Tensor, weight: Tensor, tensors: RouterTensors = NO_TENSORS, **given: Any) -> Call:
    """On the current stream."""
    stream = torch.cuda.current_stream().cuda_stream
    call = Call(len(hidden), hidden, weight, tensors, None, None, {}, None, stream)
    return call._replace(**given)


def assert_same_bits(got: Routing, expected: Routing, where: object = "") -> None:
    """Asserts that all tensors of two routings have equal bits; a NaN fails, since NaN equals nothing."""
    for name, part, other in zip(Routing._fields, got, expected, strict=True):
        assert (part is None) == (other is None), name
        if part is not None and other is not None:
            assert part.equal(other), f"{name} differs {where}"


def rows_of(routing: Routing, rows: int) -> Routing:
    """The first tokens of a routing."""
    return Routing(*(None if part is None else part[:rows] for part in routing))  # type: ignore[arg-type]


def copy_of(routing: Routing) -> Routing:
    return Routing(*(None if part is None else part.clone() for part in routing))  # type: ignore[arg-type]
