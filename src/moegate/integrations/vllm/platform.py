"""Where moegate's kernels run, and in which modes of vLLM."""

from __future__ import annotations

from vllm import envs
from vllm.platforms import current_platform


def why_not_here() -> str | None:
    """Why all of this process is left to vLLM; None: it is not."""
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        return f"platform {current_platform.device_type}"
    # The mode promises bits that do not depend on the number of tokens; moegate promises that up to 64 tokens alone.
    return "batch-invariant mode" if envs.VLLM_BATCH_INVARIANT else None
