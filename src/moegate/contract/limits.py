"""The numbers of docs/contract.md that a backend needs as well."""

from __future__ import annotations

from moegate.spec import RouterSpec

FLOAT32_MAX = 3.4028234663852886e38
MAX_DECODE_TOKENS = 64
"""Part 6: up to so many tokens the bits of a token do not depend on their number, where a backend promises it."""


def least_sum(spec: RouterSpec) -> float:
    """The least renormalising sum: far above what underflows in float32, far below any score that counts.

    A sqrtsoftplus is the root of what underflows at 2**-126.
    """
    return max(spec.renormalize_floor, 2.0**-40 if spec.scoring_func == "sqrtsoftplus" else 2.0**-100)
