"""A small run of every kernel for compute-sanitizer: `make sanitize-gpu`.

    compute-sanitizer --tool racecheck python tests/support/sanitized.py

PyTorch's caching allocator is off (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a byte beyond a tensor is unallocated.
"""

from __future__ import annotations

import itertools

import torch
from cuda_kernels import a_call, a_problem, bound_cublas, gate_on_gpu, random_hidden, routed_by, run, selected
from routers import SPECS, token_ids
from torch import Tensor

from moegate import RouterSpec, Routing, get_spec
from moegate.arguments import check_gate
from moegate.choice.candidates import DOT_GEMM, ROUTER_GEMM
from moegate.choice.dispatch import Dispatch
from moegate.halves import PartialSums
from moegate.problem import dtypes_of
from moegate.routing import RouterTensors, outputs_of
from moegate.selection.select_kernel import BoundSelect

_FEW, _ALL = (1, 9), (1, 8, 9, 17, 33, 64)
_DOTS = (1, 3)
_MORE, _SOME = 150, 600  # router_gemm with several token groups; a selection in blocks of one warp
_MANY = 1100  # a selection in blocks of several warps; cuBLAS is left out, since its findings are not moegate's
# At their real size: GEMMs with one and with three terms, and an input norm, over clusters of blocks.
_REAL = ("deepseek-v3", "minimax-m2", "longcat-flash", "gemma-4-26b-a4b")


def beside_cublas(weight: Tensor, spec: RouterSpec, tensors: RouterTensors) -> None:
    """Runs the kernels in front of cuBLAS and behind it."""
    bound = bound_cublas(spec, weight, tensors)
    device, rows = weight.device, len(weight)
    factors = None
    if bound._prepare is not None:
        _, factors = bound._prepared(bound._prepare, a_call(random_hidden(spec, _MANY), weight, tensors))
    select = BoundSelect(bound._problem, device, bound)
    for first, tokens, num_splits in itertools.product((0, 1), (_MORE, _SOME, _MANY), (1, 3)):
        sums = torch.randn(num_splits, tokens, bound._layout.columns, device=device)
        # A caller's logits may start anywhere.
        room = torch.empty(tokens * rows + 1, dtype=bound._problem.logits_dtype, device=device)
        logits = room[first:][: tokens * rows].view(tokens, rows)
        outputs = (
            torch.empty(output.shape(tokens), dtype=output.dtype, device=device) if output.is_there else None
            for output in outputs_of(spec)
        )
        ids = token_ids(tokens).cuda() if spec.hash_routing else None
        out = Routing(*outputs)._replace(logits=logits)  # type: ignore[arg-type]
        call = a_call(sums[0], weight, tensors, input_ids=ids, out=out)
        select(call, PartialSums(sums, None if factors is None else factors[:tokens]))
        if factors is None:
            bound.reduce(PartialSums(sums, None), tensors.bias, logits, call.stream)


def main() -> None:
    """Routes through every branch of the contract, and a few routers at their real size."""
    Dispatch._run_gemms = lambda *_: None  # type: ignore[method-assign]  # a gate that is made would run cuBLAS
    with torch.no_grad():
        small = [(name, spec, _FEW) for name, spec in SPECS.items()]
        for name, spec, tokens in [*small, *((name, get_spec(name), _ALL) for name in _REAL)]:
            for frozen in (True, False):
                gate = gate_on_gpu(spec, frozen=frozen)
                for rows in tokens:
                    run(gate, random_hidden(spec, rows))
            weight, tensors = check_gate(gate._given(), spec)
            if ROUTER_GEMM.unsupported(a_problem(spec), _MORE) is None:
                routed_by(ROUTER_GEMM, random_hidden(spec, _MORE), weight, spec, tensors)
            for rows in _DOTS:
                if DOT_GEMM.unsupported(a_problem(spec, dtypes_of(spec, weight.dtype, tensors)), rows) is None:
                    routed_by(DOT_GEMM, random_hidden(spec, rows), weight, spec, tensors)
            logits = torch.randn(_MANY, spec.num_gate_rows, device="cuda", dtype=getattr(torch, spec.logits_dtype))
            ids = token_ids(_MANY).cuda() if spec.hash_routing else None
            number = torch.tensor(_MANY // 2, dtype=torch.int32, device="cuda")
            for padding in (None, torch.arange(_MANY, device="cuda") % 3 == 1, number):
                selected(logits, spec, tensors, ids, padding)
            beside_cublas(weight, spec, tensors)
            print(name, flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
