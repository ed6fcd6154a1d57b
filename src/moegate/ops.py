"""The router as one PyTorch operator, for compilers: `torch.ops.moegate.route`.

A compiler that looked inside would freeze the choice that is made by the number of tokens, and cannot
follow a kernel launch. Eager calls go around it, and save the dispatch.

Defined by `Library.define` and `impl`: `torch.library.custom_op` does more in each call.
"""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import torch
from torch import Tensor

from moegate.choice.planned import planned
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec

_library = torch.library.Library("moegate", "DEF")
_library.define(
    "route(Tensor hidden, Tensor weight, str spec, Tensor? bias, Tensor? e_score_correction_bias,"
    " Tensor? input_scale, Tensor? per_expert_scale, Tensor? global_scale, Tensor? tid2eid, Tensor? input_ids,"
    " bool frozen, bool pdl, str? backend, str policy) -> (Tensor topk_ids, Tensor topk_weights, Tensor logits,"
    " Tensor shared_weights, Tensor identity_weight)",
    tags=(torch.Tag.pt2_compliant_tag,),
)

_Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def route(
    hidden: Tensor,
    weight: Tensor,
    spec: RouterSpec,
    text: str,
    tensors: RouterTensors,
    input_ids: Tensor | None,
    *,
    frozen: bool,
    pdl: bool,
    backend: str | None,
    policy: str,
) -> Routing:
    """`Backend.route` through the operator, in which no compiler looks; `text` is `spec_text(spec)`."""
    ids, weights, logits, shared, identity = torch.ops.moegate.route(
        hidden, weight, text, *tensors, input_ids, frozen, pdl, backend, policy
    )
    return Routing(
        ids, weights, logits, shared if spec.num_shared_gates else None, identity if spec.num_zero_experts else None
    )


# The spec travels as text: a number for it would mean another spec in the process that loads a compiled graph.
def spec_text(spec: RouterSpec) -> str:
    """What the operator is told of a spec."""
    return json.dumps(dataclasses.asdict(spec))


@cache
def _spec(text: str) -> RouterSpec:
    return RouterSpec(**json.loads(text))


def _run(
    hidden: Tensor,
    weight: Tensor,
    spec: str,
    bias: Tensor | None,
    e_score_correction_bias: Tensor | None,
    input_scale: Tensor | None,
    per_expert_scale: Tensor | None,
    global_scale: Tensor | None,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    frozen: bool,
    pdl: bool,
    backend: str | None,
    policy: str,
) -> _Parts:
    tensors = RouterTensors(bias, e_score_correction_bias, input_scale, per_expert_scale, global_scale, tid2eid)
    parsed = _spec(spec)
    bias_dtype = None if bias is None else bias.dtype
    _, router = planned(hidden.device, parsed, weight.dtype, bias_dtype, frozen=frozen, policy=policy, backend=backend)
    # A CPU's prepared weight is the gate's, which a compiled graph does not have: so none is made here.
    prepared = router.prepare(weight, parsed, tensors, frozen=frozen, pdl=pdl) if hidden.is_cuda else None
    routing = router.route(hidden, weight, parsed, tensors, input_ids, prepared)
    assert routing.logits is not None
    shared, identity = (
        hidden.new_empty(0, dtype=routing.topk_weights.dtype) if part is None else part
        for part in (routing.shared_weights, routing.identity_weight)
    )
    return routing.topk_ids, routing.topk_weights, routing.logits, shared, identity


def _fake(hidden: Tensor, weight: Tensor, spec: str, *_: object) -> _Parts:
    parsed, num_tokens = _spec(spec), hidden.shape[0]
    dtype = getattr(torch, parsed.topk_weights_dtype)
    shared, zero = parsed.num_shared_gates, parsed.num_zero_experts
    return (
        hidden.new_empty((num_tokens, parsed.top_k), dtype=torch.int32),
        hidden.new_empty((num_tokens, parsed.top_k), dtype=dtype),
        hidden.new_empty((num_tokens, parsed.num_gate_rows), dtype=getattr(torch, parsed.logits_dtype)),
        hidden.new_empty((num_tokens, shared) if shared else (0,), dtype=dtype),
        hidden.new_empty((num_tokens,) if zero else (0,), dtype=dtype),
    )


_library.impl("route", _run, "CompositeExplicitAutograd")
torch.library.register_fake("moegate::route", _fake, lib=_library)
