"""A router and its halves as PyTorch operators, for compilers: `torch.ops.moegate.route`, `router_gemm` and `select`.

A compiler that looked inside would freeze the choice that is made by the number of tokens, and cannot
follow a kernel launch. Eager calls go around the operators, and save PyTorch's dispatch.

Defined by `Library.define` and `impl`: `torch.library.custom_op` does more in each call.
"""

from __future__ import annotations

import json
from functools import cache

import torch
from torch import Tensor

from moegate.choice.dispatch import Options, for_gemm, for_route, for_selection
from moegate.routing import RouterTensors, Routing, outputs_of
from moegate.spec import RouterSpec

_OPTIONS = "bool frozen, bool pdl, str? backend, str policy"
_SCHEMAS = (
    "route(Tensor hidden, Tensor weight, str spec, Tensor? bias, Tensor? e_score_correction_bias, Tensor? input_scale,"
    f" Tensor? per_expert_scale, Tensor? global_scale, Tensor? tid2eid, Tensor? input_ids, Tensor? padding, {_OPTIONS})"
    " -> (Tensor topk_ids, Tensor topk_weights, Tensor logits, Tensor shared_weights, Tensor identity_weight)",
    f"router_gemm(Tensor hidden, Tensor weight, Tensor? bias, ScalarType out_dtype, {_OPTIONS}) -> Tensor",
    "select(Tensor logits, str spec, Tensor? e_score_correction_bias, Tensor? per_expert_scale, Tensor? global_scale,"
    f" Tensor? tid2eid, Tensor? input_ids, Tensor? padding, {_OPTIONS})"
    " -> (Tensor topk_ids, Tensor topk_weights, Tensor shared_weights, Tensor identity_weight)",
)
_library = torch.library.Library("moegate", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


def route(
    hidden: Tensor,
    weight: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    input_ids: Tensor | None,
    padding: Tensor | None,
    options: Options,
    *,
    text: str | None = None,
) -> Routing:
    """`Dispatch.route` through the operator, in which no compiler looks; `text` is `spec_text(spec)`, if known."""
    text = text or spec_text(spec)
    return _routing(spec, *torch.ops.moegate.route(hidden, weight, text, *tensors, input_ids, padding, *options))


def router_gemm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, out_dtype: torch.dtype, options: Options
) -> Tensor:
    """`Dispatch.router_gemm` through the operator."""
    logits: Tensor = torch.ops.moegate.router_gemm(hidden, weight, bias, out_dtype, *options)
    return logits


def select(
    logits: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    input_ids: Tensor | None,
    padding: Tensor | None,
    options: Options,
) -> Routing:
    """`Dispatch.select` through the operator; the routing has no logits."""
    small = tensors.e_score_correction_bias, tensors.per_expert_scale, tensors.global_scale, tensors.tid2eid
    ids, weights, *others = torch.ops.moegate.select(logits, spec_text(spec), *small, input_ids, padding, *options)
    return _routing(spec, ids, weights, None, *others)


def _routing(spec: RouterSpec, *parts: Tensor | None) -> Routing:
    """What an operator returned, less the empty tensors in the place of those that the spec does not give."""
    wanted = zip(outputs_of(spec), parts, strict=True)
    return Routing(*(part if output.is_there else None for output, part in wanted))  # type: ignore[arg-type]


# The spec travels as text: a number for it would mean another spec in the process that loads a compiled graph.
def spec_text(spec: RouterSpec) -> str:
    """What the operators are told of a spec: JSON of the fields that are not at their defaults."""
    return spec._text


@cache
def _spec(text: str) -> RouterSpec:
    return RouterSpec(**json.loads(text))


def _run_route(
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
    padding: Tensor | None,
    frozen: bool,
    pdl: bool,
    backend: str | None,
    policy: str,
) -> tuple[Tensor, ...]:
    tensors = RouterTensors(bias, e_score_correction_bias, input_scale, per_expert_scale, global_scale, tid2eid)
    parsed = _spec(spec)
    dispatch = for_route(hidden.device, parsed, weight, tensors, Options(frozen, pdl, backend, policy))
    # A CPU's packed weight is the gate's, which a compiled graph does not have: so none is made here.
    return _parts(dispatch.route(hidden, weight, tensors, input_ids, {}, padding=padding), parsed)


def _run_router_gemm(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    frozen: bool,
    pdl: bool,
    backend: str | None,
    policy: str,
) -> Tensor:
    dispatch = for_gemm(hidden.device, weight, bias, out_dtype, Options(frozen, pdl, backend, policy))
    return dispatch.router_gemm(hidden, weight, RouterTensors(bias), {})


def _run_select(
    logits: Tensor,
    spec: str,
    e_score_correction_bias: Tensor | None,
    per_expert_scale: Tensor | None,
    global_scale: Tensor | None,
    tid2eid: Tensor | None,
    input_ids: Tensor | None,
    padding: Tensor | None,
    frozen: bool,
    pdl: bool,
    backend: str | None,
    policy: str,
) -> tuple[Tensor, ...]:
    tensors = RouterTensors(None, e_score_correction_bias, None, per_expert_scale, global_scale, tid2eid)
    parsed, options = _spec(spec), Options(frozen, pdl, backend, policy)
    dispatch = for_selection(logits.device, parsed, logits.dtype, tensors, options)
    ids, weights, _, *others = _parts(dispatch.select(logits, tensors, input_ids, padding), parsed)
    return ids, weights, *others


def _parts(routing: Routing, spec: RouterSpec) -> tuple[Tensor, ...]:
    """An operator returns tensors alone: an empty one for each that the spec does not give."""
    ids = routing.topk_ids
    return tuple(
        ids.new_empty(0, dtype=output.dtype) if part is None else part
        for output, part in zip(outputs_of(spec), routing, strict=True)
    )


def _fake_route(hidden: Tensor, weight: Tensor, spec: str, *_: object) -> tuple[Tensor, ...]:
    return tuple(
        hidden.new_empty(output.shape(hidden.shape[0]) if output.is_there else (0,), dtype=output.dtype)
        for output in outputs_of(_spec(spec))
    )


def _fake_router_gemm(hidden: Tensor, weight: Tensor, bias: object, out_dtype: torch.dtype, *_: object) -> Tensor:
    return hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=out_dtype)


def _fake_select(logits: Tensor, spec: str, *_: object) -> tuple[Tensor, ...]:
    ids, weights, _logits, *others = _fake_route(logits, logits, spec)
    return ids, weights, *others


for _name, _run, _fake in (
    ("route", _run_route, _fake_route),
    ("router_gemm", _run_router_gemm, _fake_router_gemm),
    ("select", _run_select, _fake_select),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"moegate::{_name}", _fake, lib=_library)
