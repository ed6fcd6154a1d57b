"""A small run of every kernel for compute-sanitizer: `make sanitize-gpu`.

    compute-sanitizer --tool racecheck python tests/sanitized.py

Its allocator keeps nothing (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that a byte beyond a tensor is nobody's.
"""

from __future__ import annotations

import torch
from cuda_kernels import gate_on_gpu, random_hidden, run
from routers import SPECS

from moegate import get_spec

_FEW, _ALL = (1, 9), (1, 8, 9, 17, 33, 64, 65)
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
            print(name, flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
