"""The numbers of docs/contract.md that backends use."""

from __future__ import annotations

from moegate.spec import RouterSpec

FLOAT32_MAX = 3.4028234663852886e38
MAX_DECODE_TOKENS = 64
"""Section 6: up to so many tokens, a token's bits do not depend on M, on backends that promise it."""


def least_sum(spec: RouterSpec) -> float:
    """The least renormalising sum: far above float32's underflow, far below any score that matters.

    It is larger for sqrtsoftplus, whose scores underflow at the root of 2**-126.
    """
    return max(spec.renormalize_floor, 2.0**-40 if spec.scoring_func == "sqrtsoftplus" else 2.0**-100)
