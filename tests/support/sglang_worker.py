"""What a worker process of the tests runs: as SGLang's, it loads the plugins, then routes."""

from __future__ import annotations

import sglang_stubs


def show() -> None:
    """Prints what the process routes with, and routes."""
    sglang_stubs.install()
    import torch
    from sglang.srt.layers.moe import topk
    from sglang.srt.models import deepseek_v2
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import get_context
    from sglang_layers import GROUPED, backend_of, gate_of, hidden_of, top_k_of

    load_plugins()
    is_hooked = hasattr(deepseek_v2.MoEGate.forward, "__wrapped__")
    is_bound = deepseek_v2.TopK is topk.TopK
    print("in the worker: TopK", topk.TopK.__name__, is_bound, "MoEGate", is_hooked, flush=True)
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    with get_context().override_server_args(), torch.inference_mode():
        gate = gate_of()
        top_k = top_k_of(gate.e_score_correction_bias, **GROUPED)
        for _ in range(2):
            backend, _ = backend_of(top_k, hidden_of(2), gate(hidden_of(2)))
            assert backend == "plugin"
