"""A small run of every kernel for compute-sanitizer: `make sanitize-gpu`.

    compute-sanitizer --tool racecheck python tests/sanitized.py

Its allocator keeps nothing (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a byte beyond a tensor is nobody's.
"""

from __future__ import annotations

import torch
from cuda_kernels import gate_on_gpu, random_hidden, run
from routers import SPECS, token_ids
from torch import Tensor

from moegate import RouterSpec, get_spec
from moegate.backends.cuda import CudaBackend
from moegate.backends.cuda.selection import select_dtypes, select_kernels
from moegate.backends.cuda.split import split_kernels
from moegate.backends.cuda.tiling import MAX_GEMM_TOKENS
from moegate.routing import RouterTensors

_FEW, _ALL = (1, 9), (1, 8, 9, 17, 33, 64)
_MORE = 150  # router_gemm in groups of tokens
_MANY = 1100  # a selection's blocks have several warps there; cuBLAS, whose findings are not ours, stays out
# At their real size: products of one, three and again three parts, and an input norm, over clusters of blocks.
_REAL = ("deepseek-v3", "minimax-m2", "longcat-flash", "gemma-4-26b-a4b")


def beside_cublas(weight: Tensor, spec: RouterSpec, tensors: RouterTensors, ids: Tensor | None) -> None:
    """What runs before and after it."""
    device, stream = weight.device, torch.cuda.current_stream().cuda_stream
    bias_dtype = None if tensors.bias is None else tensors.bias.dtype
    products, logits_dtype = 1, getattr(torch, spec.logits_dtype)
    logits = torch.empty((_MANY, spec.num_gate_rows), dtype=logits_dtype, device=device)
    if weight.dtype == torch.float32:
        products = 3
        kernels = split_kernels(*weight.shape[::-1], bias_dtype, logits_dtype, device, pdl=True)
        kernels.parts(weight, stream)
        kernels.add_up(torch.randn(_MANY, 3 * logits.shape[1], device=device), tensors.bias, logits, stream)
    dtypes = select_dtypes(logits_dtype, tensors, None if ids is None else ids.dtype)._replace(bias=bias_dtype)
    select = select_kernels(spec, dtypes, device, aligned=True, frozen=False, pdl=True, products=products)
    made = torch.randn(_MANY, products * logits.shape[1], device=device)
    select.launch(select.outputs(logits), tensors, ids, stream, products=made)


def main() -> None:
    """Routes through every way of the contract, and a few routers at their real size."""
    with torch.no_grad():
        small = [(name, spec, _FEW) for name, spec in SPECS.items()]
        for name, spec, tokens in [*small, *((name, get_spec(name), _ALL) for name in _REAL)]:
            for frozen in (True, False):
                gate = gate_on_gpu(spec, frozen=frozen)
                for rows in tokens:
                    run(gate, random_hidden(spec, rows))
            weight, tensors = gate._tensors()
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
