"""A small run of every kernel for compute-sanitizer: `make sanitize-gpu`.

    compute-sanitizer --tool racecheck python tests/support/sanitized.py

Its allocator keeps nothing (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a byte beyond a tensor is nobody's.
"""

from __future__ import annotations

import itertools

import torch
from cuda_kernels import gate_on_gpu, random_hidden, run
from routers import SPECS, token_ids
from torch import Tensor

from moegate import RouterSpec, get_spec
from moegate.arguments import check_gate
from moegate.backends.cuda import CudaBackend
from moegate.backends.cuda.product import product_of, sum_of
from moegate.backends.cuda.selection import select_dtypes, select_kernels
from moegate.backends.cuda.sources import InputNorm
from moegate.backends.cuda.tiling import MAX_GEMM_TOKENS
from moegate.routing import RouterTensors

_FEW, _ALL = (1, 9), (1, 8, 9, 17, 33, 64)
_MORE, _SOME = 150, 600  # router_gemm in groups of tokens; a selection in blocks of one warp
_MANY = 1100  # a selection's blocks have several warps there; cuBLAS, whose findings are not ours, stays out
# At their real size: products of one, three and again three parts, and an input norm, over clusters of blocks.
_REAL = ("deepseek-v3", "minimax-m2", "longcat-flash", "gemma-4-26b-a4b")


def beside_cublas(weight: Tensor, spec: RouterSpec, tensors: RouterTensors, ids: Tensor | None) -> None:
    """What runs before and after it."""
    device, stream = weight.device, torch.cuda.current_stream().cuda_stream
    bias_dtype, logits_dtype = None if tensors.bias is None else tensors.bias.dtype, getattr(torch, spec.logits_dtype)
    (rows, hidden_size), scale, eps, factors = weight.shape, tensors.input_scale, spec.input_norm_eps, None
    norm = None if scale is None or eps is None else InputNorm(eps, scale.dtype)
    product = product_of(hidden_size, rows, weight.dtype, device, norm, pdl=True)
    if product.weight_parts > 1 or rows % 8 != 0:
        _, factors = product.prepared(random_hidden(spec, _MANY), weight, scale, stream)
    dtypes = select_dtypes(logits_dtype, tensors, None if ids is None else ids.dtype)._replace(bias=bias_dtype)
    for aligned, tokens, shares in itertools.product((True, False), (_MORE, _SOME, _MANY), (1, 3)):
        select = select_kernels(
            spec, dtypes, device, aligned=aligned, frozen=False, pdl=True, weight_parts=product.weight_parts
        )
        products = torch.randn(shares, tokens, -(-product.weight_parts * rows // 8) * 8, device=device)
        logits = torch.empty((tokens, rows), dtype=logits_dtype, device=device)
        routing = select.outputs(logits, tokens)
        select.launch(routing, tensors, ids, tokens, stream, products=products, norm_factors=factors)
        sum_of(rows, product.weight_parts, bias_dtype, logits_dtype, device)(products, tensors.bias, logits, stream)


def main() -> None:
    """Routes through every way of the contract, and a few routers at their real size."""
    with torch.no_grad():
        small = [(name, spec, _FEW) for name, spec in SPECS.items()]
        for name, spec, tokens in [*small, *((name, get_spec(name), _ALL) for name in _REAL)]:
            for frozen in (True, False):
                gate = gate_on_gpu(spec, frozen=frozen)
                for rows in tokens:
                    run(gate, random_hidden(spec, rows))
            weight, tensors = check_gate(gate._given(), spec)
            ids = token_ids(_MORE).cuda() if spec.hash_routing else None
            CudaBackend(MAX_GEMM_TOKENS).route(random_hidden(spec, _MORE), weight, spec, tensors, ids, None)
            logits = torch.randn(_MANY, spec.num_gate_rows, device="cuda", dtype=getattr(torch, spec.logits_dtype))
            ids = token_ids(_MANY).cuda() if spec.hash_routing else None
            CudaBackend().select(logits, spec, tensors, ids)
            beside_cublas(weight, spec, tensors, ids)
            print(name, flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
