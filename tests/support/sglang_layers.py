"""Gates and selections of SGLang for tests, and SGLang's own routing beside moegate's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moegate import RouterSpec, Routing
from moegate.contract.reference import choice_keys, finite_logits
from moegate.routing import RouterTensors

EXPERTS, HIDDEN, TOP_K = 64, 128, 6
GROUPED = {"use_grouped_topk": True, "num_expert_group": 8, "topk_group": 4}


def top_k_of(bias: Tensor | None = None, *, top_k: int = TOP_K, layer_id: int = 3, **config: Any) -> Any:
    """A `TopK` of SGLang, with the standard output."""
    from sglang.srt.layers.moe.topk import TopK, TopKOutputFormat

    return TopK(top_k, layer_id=layer_id, correction_bias=bias, output_format=TopKOutputFormat.STANDARD, **config)


def gate_of(dtype: torch.dtype = torch.bfloat16, *, seed: int = 0, **config: Any) -> Any:
    """A `MoEGate` of SGLang with random weights and a float32 bias."""
    from sglang.srt.models.deepseek_v2 import MoEGate

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = {"n_routed_experts": EXPERTS, "hidden_size": HIDDEN, "topk_method": "noaux_tc", **config}
        gate = MoEGate(SimpleNamespace(**model), None)
    finally:
        torch.set_default_dtype(before)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator) * 0.1)
        gate.e_score_correction_bias.copy_(bias_of(seed))
    return gate


def own_forward(dtype: torch.dtype, *, tokens: int, **config: Any) -> Any:
    """What SGLang's own `MoEGate.forward` returns, of a gate without values."""
    from sglang.srt.models.deepseek_v2 import MoEGate

    with torch.device("meta"):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            gate = MoEGate(SimpleNamespace(topk_method="greedy", **config), None)
        finally:
            torch.set_default_dtype(before)
        hidden = torch.empty(tokens, config["hidden_size"], dtype=dtype)
    return MoEGate.forward.__wrapped__(gate, hidden)


def bias_of(seed: int) -> Tensor:
    return torch.rand(EXPERTS, generator=torch.Generator().manual_seed(seed)) * 0.2


def logits_of(tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def hidden_of(tokens: int, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(seed)).to(dtype)


def backend_of(top_k: Any, hidden: Tensor, logits: Tensor, **given: Any) -> tuple[str, Any]:
    """What SGLang's trace says ran in a call, and the call's output."""
    from sglang.kernels import fused_op

    fused_op.clear_fused_op_trace()
    fused_op.enable_fused_op_trace()
    try:
        output = top_k(hidden, logits, **given)
    finally:
        fused_op.disable_fused_op_trace()
    (record,) = fused_op.get_fused_op_trace()
    return record.backend, output


def own(top_k: Any, hidden: Tensor, logits: Tensor, **given: Any) -> Any:
    """SGLang's own routing for the same call."""
    return top_k.forward_native(hidden, logits.clone(), **given)


def as_routing(output: Any, logits: Tensor, spec: RouterSpec, tensors: RouterTensors) -> Routing:
    """SGLang's output for `verify_routing`, in the order of the exact keys, since SGLang's torch.topk does not sort."""
    ids, weights = output.topk_ids.long(), output.topk_weights
    keys = choice_keys(finite_logits(logits, torch.float64), spec, tensors)
    order = keys.gather(-1, ids).argsort(dim=-1, descending=True)
    return Routing(ids.gather(-1, order).int(), weights.gather(-1, order))
