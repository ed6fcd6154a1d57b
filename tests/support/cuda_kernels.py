"""What the tests of the CUDA kernels share: plans for chips that are not here, gates on a GPU, bit-exact comparison."""

from __future__ import annotations

from typing import Any

import torch
from routers import generator, tensors_of, token_ids
from torch import Tensor

from moegate import Gate, RouterSpec, Routing
from moegate.backends.cuda import sources, tiling
from moegate.contract.verify import verify_logits, verify_routing
from moegate.routing import RouterTensors

# The fewest and the most multiprocessors of the GPUs of a compute capability, by NVIDIA's data sheets: the plan of a
# product goes by them.
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
# The most that a block can have of shared memory: CUDA C++ Programming Guide, table of compute capabilities.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 120: 99 << 10, 121: 99 << 10}
DEEPSEEK_V3 = RouterSpec(
    7168, 256, 8, "sigmoid", "score", 8, 4, renormalize=True, renormalize_eps=1e-20, routed_scaling_factor=2.5
)


def number_of(arch: str) -> int:
    """90 for sm_90a and compute_90."""
    return int("".join(filter(str.isdigit, arch)))


def gemm_texts(
    arch: str, hidden_size: int, rows: int, dtypes: sources.GemmDtypes, norm_eps: float | None, *, frozen: bool
) -> list[str]:
    """The texts of a router GEMM, as it is planned for the smallest and the largest chip of that architecture."""
    operand_parts = tiling.parts(dtypes.hidden, dtypes.weight, norm_eps is not None)[:2]
    number = number_of(arch)
    texts = []
    for num_sms in SMS[number]:
        chip = tiling.Chip(num_sms, number >= 90, SHARED_BYTES.get(number, 227 << 10))
        of_chip = tiling.plan_gemm(hidden_size, rows, operand_parts, chip)
        texts.append(sources.gemm_source(hidden_size, rows, dtypes, norm_eps, of_chip, frozen=frozen))
    return list(dict.fromkeys(texts))


def select_text(spec: RouterSpec, *, aligned: bool = True, frozen: bool = False, weight_parts: int = 0) -> str:
    """The text of a selection, with the dtypes of routers.tensors_of."""
    tensors = tensors_of(spec)
    dtypes = sources.SelectDtypes(
        getattr(torch, spec.logits_dtype),
        None if tensors.per_expert_scale is None else tensors.per_expert_scale.dtype,
        None if tensors.global_scale is None else tensors.global_scale.dtype,
        None if tensors.tid2eid is None else tensors.tid2eid.dtype,
        torch.int64 if spec.hash_routing else None,
        None if tensors.bias is None or weight_parts == 0 else tensors.bias.dtype,
    )
    return sources.select_source(spec, dtypes, aligned=aligned, frozen=frozen, weight_parts=weight_parts)


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
    """A gate of routers.tensors_of, with a weight of its own unless one is given."""
    tensors = on_gpu(tensors_of(spec))._asdict()
    return Gate(spec, random_weight(spec, dtype) if weight is None else weight, **tensors, **given)


def run(gate: Gate, hidden: Tensor, *, return_logits: bool = True) -> Routing:
    """The gate's routing, with the token ids of routers.token_ids where it hashes."""
    ids = token_ids(len(hidden)).cuda() if gate.spec.hash_routing else None
    routing: Routing = gate(hidden, input_ids=ids, return_logits=return_logits)
    return routing


def problems_of(
    routing: Routing, hidden: Tensor, weight: Tensor, spec: RouterSpec, tensors: RouterTensors
) -> list[str]:
    """Breaches of the contract by a routing that has its logits."""
    assert routing.logits is not None
    ids = token_ids(len(hidden)) if spec.hash_routing else None
    of_logits = verify_logits(routing.logits, hidden, weight, spec, tensors).problems
    return of_logits + verify_routing(routing, routing.logits, spec, tensors, input_ids=ids).problems


def assert_same_bits(got: Routing, expected: Routing, where: object = "") -> None:
    """Equal to the bit, in every part that there is; NaN is equal to nothing, so that it fails too."""
    for name, part, other in zip(Routing._fields, got, expected, strict=True):
        assert (part is None) == (other is None), name
        if part is not None and other is not None:
            assert part.equal(other), f"{name} differs {where}"


def rows_of(routing: Routing, rows: int) -> Routing:
    """The first tokens of a routing."""
    return Routing(*(None if part is None else part[:rows] for part in routing))  # type: ignore[arg-type]


def copy_of(routing: Routing) -> Routing:
    return Routing(*(None if part is None else part.clone() for part in routing))  # type: ignore[arg-type]
