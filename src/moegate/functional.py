"""The functions: `router_gemm`, `select` and `route`."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate import arguments, ops
from moegate.choice.dispatch import Options, for_gemm, for_route, for_selection
from moegate.plain import META, are_plain, can_be_asked, is_compiling
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec


@torch.no_grad()
def router_gemm(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """The logits of a router: `hidden @ weight.T + bias`.

    The products of half-precision numbers are exact, the sum is accumulated in float32, and the
    result is rounded once if `out_dtype` is bfloat16. docs/contract.md bounds the error. A spec's
    input norm is not computed here: that needs a `Gate` or `route`.

    Args:
        hidden: [M, K] bfloat16, float16 or float32. M may be 0; rows may be apart, a row is contiguous.
        weight: [N, K] bfloat16, float16 or float32, N from 1 to 1024, on the same device. The two
            dtypes may differ.
        bias: [N] in any of these dtypes, added before the rounding; None: no bias.
        out_dtype: torch.float32 or torch.bfloat16. The logits of a spec's gate have
            `getattr(torch, spec.logits_dtype)`.

    Returns:
        The logits [M, N] in `out_dtype`. No gradient flows through them.

    Raises:
        TypeError: Not a tensor, or a dtype that is not allowed.
        ValueError: A shape, stride, device or `out_dtype` that is not allowed.
    """
    arguments.check_gemm(hidden, weight, bias, out_dtype)
    if is_compiling():
        return ops.router_gemm(
            hidden.detach(), weight.detach(), None if bias is None else bias.detach(), out_dtype, Options()
        )
    device = _place(hidden, weight, bias)
    return for_gemm(device, weight, bias, out_dtype, Options()).router_gemm(hidden, weight, RouterTensors(bias), {})


@torch.no_grad()
def select(
    logits: Tensor,
    spec: RouterSpec,
    *,
    e_score_correction_bias: Tensor | None = None,
    per_expert_scale: Tensor | None = None,
    global_scale: Tensor | None = None,
    tid2eid: Tensor | None = None,
    input_ids: Tensor | None = None,
    padding: Tensor | None = None,
) -> Routing:
    """The experts of each token and their weights, from logits.

    Args:
        logits: [M, R] float32 or bfloat16, taken as they are, whatever `spec.logits_dtype`;
            R = `spec.num_gate_rows`, M may be 0.
        spec: What the router computes. The tensors below must be given just when it asks for them.
        e_score_correction_bias: [num_experts + num_zero_experts] float32.
        per_expert_scale: [num_experts] float32, bfloat16 or float16.
        global_scale: [1] float32, bfloat16 or float16.
        tid2eid: [vocabulary, top_k] int32 or int64, the experts of each token id, distinct in a row.
        input_ids: [M] int32 or int64, the token ids for hash routing.
        padding: The rows that are no token's: a mask [M] bool, or how many rows in front are a token's, [1] or []
            int32. Rows of padding get id -1 and weight 0. The values are read on the device, when the kernels run.

    Returns:
        A `Routing` without logits. No gradient flows through it.

    Raises:
        TypeError: Not a tensor, or a dtype that is not allowed.
        ValueError: A shape, stride or device that is not allowed, a tensor that the spec does not ask
            for or one missing; on a CPU, a token id outside the table.
    """
    arguments.check_spec(spec)
    logits = arguments.check_logits(logits, spec)
    tensors = RouterTensors(
        e_score_correction_bias=e_score_correction_bias,
        per_expert_scale=per_expert_scale,
        global_scale=global_scale,
        tid2eid=tid2eid,
    )
    arguments.check_tensors(spec, tensors, logits.device, gemm=False)
    _check_rows(input_ids, padding, spec, tensors, len(logits), logits.device)
    if is_compiling():
        return ops.select(logits.detach(), spec, tensors.detach(), input_ids, padding, Options())
    device = _place(logits, *tensors, input_ids, padding)
    dispatch = for_selection(device, spec, logits.dtype, tensors, Options())
    return dispatch.select(logits, tensors, input_ids, padding).without_logits()


@torch.no_grad()
def route(
    hidden: Tensor,
    weight: Tensor,
    spec: RouterSpec,
    *,
    bias: Tensor | None = None,
    e_score_correction_bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    per_expert_scale: Tensor | None = None,
    global_scale: Tensor | None = None,
    tid2eid: Tensor | None = None,
    input_ids: Tensor | None = None,
    padding: Tensor | None = None,
    return_logits: bool = False,
    backend: str | None = None,
) -> Routing:
    """The whole router: hidden states in, expert ids and weights out. `Gate` does it faster, again and again.

    Args:
        hidden: [M, K] bfloat16, float16 or float32; M may be 0.
        weight: [R, K] bfloat16, float16 or float32 (float32 alone if the spec pins it); `Gate` has the order of rows.
        spec: What the router computes. The tensors below must be given just when it asks for them.
        bias: [R] float32, bfloat16 or float16, the linear bias.
        e_score_correction_bias: [num_experts + num_zero_experts] float32.
        input_scale: [K] float32, bfloat16 or float16, of the input norm.
        per_expert_scale: [num_experts] float32, bfloat16 or float16.
        global_scale: [1] float32, bfloat16 or float16.
        tid2eid: [vocabulary, top_k] int32 or int64, the experts of each token id, distinct in a row.
        input_ids: [M] int32 or int64, the token ids for hash routing.
        padding: The rows that are no token's: a mask [M] bool, or how many rows in front are a token's, [1] or []
            int32. Rows of padding get id -1 and weight 0. The values are read on the device, when the kernels run.
        return_logits: Also return the logits [M, R] in the spec's `logits_dtype`.
        backend: "torch", "cuda" or "flashinfer": only this one runs; see `Gate`. None: the measured policy chooses.

    Returns:
        A `Routing`. No gradient flows through it.

    Raises:
        TypeError: Not a tensor, or a dtype that is not allowed.
        ValueError: A shape, stride or device that is not allowed, a tensor that the spec does not ask
            for or one missing; on a CPU, a token id outside the table; a backend that cannot run here.
    """
    arguments.check_spec(spec)
    weight = arguments.check_weight(weight, spec)
    hidden = arguments.check_hidden(hidden, spec, weight.device)
    tensors = RouterTensors(bias, e_score_correction_bias, input_scale, per_expert_scale, global_scale, tid2eid)
    arguments.check_tensors(spec, tensors, hidden.device)
    _check_rows(input_ids, padding, spec, tensors, len(hidden), hidden.device)
    routing = _routed(hidden, weight, spec, tensors, input_ids, padding, Options(backend=backend))
    return routing if return_logits else routing.without_logits()


def _routed(
    hidden: Tensor,
    weight: Tensor,
    spec: RouterSpec,
    tensors: RouterTensors,
    input_ids: Tensor | None,
    padding: Tensor | None,
    options: Options,
) -> Routing:
    if is_compiling():
        return ops.route(hidden.detach(), weight.detach(), spec, tensors.detach(), input_ids, padding, options)
    dispatch = for_route(_place(hidden, weight, *tensors, input_ids, padding), spec, weight, tensors, options)
    return dispatch.route(hidden, weight, tensors, input_ids, {}, padding=padding)


def _place(first: Tensor, *others: Tensor | None) -> torch.device:
    """The device that is planned for: META if only PyTorch's operations take these tensors, or take them now."""
    return first.device if are_plain((first, *others)) else META


def _check_rows(
    input_ids: Tensor | None,
    padding: Tensor | None,
    spec: RouterSpec,
    tensors: RouterTensors,
    num_tokens: int,
    device: torch.device,
) -> None:
    """Checks what is said of the rows and, on a CPU, the rows of the table; `Gate` has checked the whole table."""
    ids = arguments.check_rows(input_ids, padding, spec, tensors, num_tokens, device)
    if ids is not None and tensors.tid2eid is not None and can_be_asked(ids) and can_be_asked(tensors.tid2eid):
        arguments.check_table(tensors.tid2eid[ids.long()], spec)
