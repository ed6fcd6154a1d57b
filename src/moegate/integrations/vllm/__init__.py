"""vLLM: its MoE layers routed by moegate, as a plugin that vLLM finds by itself.

docs/vllm.md says how to switch it on, and what is left to vLLM.
"""

from __future__ import annotations

from moegate.integrations.engines import VLLM


def register() -> None:
    """Puts moegate's layers in the place of vLLM's, if the user switched moegate on.

    vLLM calls this in each of its processes, before it builds a model, and perhaps twice. Where moegate cannot replace
    vLLM's layers, vLLM stays as it is, and a warning says why.
    """
    if not VLLM.is_asked_for():
        return
    # In every vLLM beside an installed moegate this module is imported; the rest, only where moegate is on.
    from moegate.integrations.vllm.registration import register_layers

    register_layers()
