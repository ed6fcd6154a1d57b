"""A small run of every kernel for compute-sanitizer: `make sanitize-gpu`.

    compute-sanitizer --tool racecheck python tests/sanitized.py

Its allocator keeps nothing (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a byte beyond a tensor is nobody's.
"""

from __future__ import annotations

import torch
from cuda_kernels import gate_on_gpu, on_gpu, random_hidden, run
from routers import SPECS, tensors_of, token_ids

from moegate import get_spec
from moegate.backends.cuda import CudaBackend

_FEW, _ALL = (1, 9), (1, 8, 9, 17, 33, 64)
_MANY = 1100  # a selection's blocks have several warps there; cuBLAS, whose findings are not ours, stays out
# At their real size: products of one, three and again three parts, and an input norm, over clusters of blocks.
_REAL = ("deepseek-v3", "minimax-m2", "longcat-flash", "gemma-4-26b-a4b")


def main() -> None:
    """Routes through every way of the contract, and a few routers at their real size."""
    with torch.no_grad():
        small = [(name, spec, _FEW) for name, spec in SPECS.items()]
        for name, spec, tokens in [*small, *((name, get_spec(name), _ALL) for name in _REAL)]:
            for frozen in (True, False):
                gate = gate_on_gpu(spec, frozen=frozen)
                for rows in tokens:
                    run(gate, random_hidden(spec, rows))
            logits = torch.randn(_MANY, spec.num_gate_rows, device="cuda", dtype=getattr(torch, spec.logits_dtype))
            ids = token_ids(_MANY).cuda() if spec.hash_routing else None
            CudaBackend().select(logits, spec, on_gpu(tensors_of(spec)), ids)
            print(name, flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
