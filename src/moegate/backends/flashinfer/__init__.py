"""FlashInfer's router kernels, through its public API: for those who want them, never the default.

They leave ties and NaN undefined and change a token's bits with the number of tokens, so that this is no
`Backend`, which keeps docs/contract.md, but only a `Router`. Nothing is imported before it is asked for.
"""

from moegate.backends.flashinfer.router import FlashInferRouter, known_failure

__all__ = ["FlashInferRouter", "known_failure"]
