"""What goes into a router beside `hidden` and its weight, and what comes out."""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moegate.plain import is_compiling
from moegate.spec import RouterSpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
LOGITS = (torch.float32, torch.bfloat16)
INTEGERS = (torch.int32, torch.int64)
PADDINGS = (torch.bool, torch.int32)
"""A mask, or a number of rows."""


class Input(NamedTuple):
    """A tensor of a gate: when a spec asks for it, and what it may be."""

    name: str
    """In `Gate` and in `RouterTensors`."""
    half: Literal["gemm", "selection"]
    """The half of a route that reads it."""
    field: str
    """The field of the spec that decides whether there is one."""
    is_needed: bool
    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int | str, ...]
    """A letter stands for any size: V, the vocabulary."""


def inputs_of(spec: RouterSpec) -> tuple[Input, ...]:
    """The tensors of a gate: the weight, then those of `RouterTensors` in their order."""
    # Compilers look into a cache, and say so in a warning.
    return _inputs_of(spec) if is_compiling() else _kept_inputs_of(spec)


def _inputs_of(spec: RouterSpec) -> tuple[Input, ...]:
    rows, pinned = spec.num_gate_rows, spec.weight_dtype == "float32"
    return (
        Input("weight", "gemm", "weight_dtype", True, FLOATS[:1] if pinned else FLOATS, (rows, spec.hidden_size)),
        Input("bias", "gemm", "linear_bias", spec.linear_bias, FLOATS, (rows,)),
        Input(
            "e_score_correction_bias",
            "selection",
            "correction_bias",
            spec.correction_bias is not None,
            (torch.float32,),
            (spec.num_selectable,),
        ),
        Input("input_scale", "gemm", "input_norm_eps", spec.input_norm_eps is not None, FLOATS, (spec.hidden_size,)),
        Input("per_expert_scale", "selection", "per_expert_scale", spec.per_expert_scale, FLOATS, (spec.num_experts,)),
        Input("global_scale", "selection", "global_scale", spec.global_scale, FLOATS, (1,)),
        Input("tid2eid", "selection", "hash_routing", spec.hash_routing, INTEGERS, ("V", spec.top_k)),
    )


class Output(NamedTuple):
    """A tensor of a `Routing`."""

    name: str
    field: str | None
    """The field of the spec that decides whether there is one; None: there always is."""
    is_there: bool
    dtype: torch.dtype
    columns: int | None
    """Shape [M, columns]; None: [M]."""

    def shape(self, num_tokens: int) -> tuple[int, ...]:
        """The shape for M tokens."""
        return (num_tokens,) if self.columns is None else (num_tokens, self.columns)


def outputs_of(spec: RouterSpec) -> tuple[Output, ...]:
    """What a routing consists of, in the order of `Routing`."""
    return _outputs_of(spec) if is_compiling() else _kept_outputs_of(spec)


def _outputs_of(spec: RouterSpec) -> tuple[Output, ...]:
    ids_dtype: torch.dtype = getattr(torch, spec.topk_ids_dtype)
    weights_dtype: torch.dtype = getattr(torch, spec.topk_weights_dtype)
    logits_dtype: torch.dtype = getattr(torch, spec.logits_dtype)
    shared, zero = spec.num_shared_gates, spec.num_zero_experts
    return (
        Output("topk_ids", None, True, ids_dtype, spec.top_k),
        Output("topk_weights", None, True, weights_dtype, spec.top_k),
        Output("logits", None, True, logits_dtype, spec.num_gate_rows),
        Output("shared_weights", "num_shared_gates", shared > 0, weights_dtype, shared),
        Output("identity_weight", "num_zero_experts", zero > 0, weights_dtype, None),
    )


_kept_inputs_of, _kept_outputs_of = cache(_inputs_of), cache(_outputs_of)


class RouterTensors(NamedTuple):
    """The small tensors of one gate; a spec says which of them it needs.

    E counts the selectable experts, R the gate's rows, K the hidden size, V the vocabulary.
    """

    bias: Tensor | None = None
    """[R], bf16, fp16 or fp32: added to the logits (`linear_bias`)."""
    e_score_correction_bias: Tensor | None = None
    """[E] float32: added to the key of the choice (`correction_bias`)."""
    input_scale: Tensor | None = None
    """[K], bf16, fp16 or fp32: multiplies the normed input (`input_norm_eps`)."""
    per_expert_scale: Tensor | None = None
    """[N], bf16, fp16 or fp32: multiplies the weight of its expert (`per_expert_scale`)."""
    global_scale: Tensor | None = None
    """[1], bf16, fp16 or fp32: multiplies all weights (`global_scale`)."""
    tid2eid: Tensor | None = None
    """[V, k] int32 or int64: the experts of each token id (`hash_routing`)."""

    def detach(self) -> RouterTensors:
        """The same, for an operator through which no gradient flows."""
        return RouterTensors(*(None if tensor is None else tensor.detach() for tensor in self))


class Routing(NamedTuple):
    """Where M tokens go."""

    topk_ids: Tensor
    """[M, k] in the spec's `topk_ids_dtype`: distinct ids in 0..E-1, by key, best first (hash
    routing: in the table's order). -1 in rows that are padding."""
    topk_weights: Tensor
    """[M, k] in the spec's `topk_weights_dtype`: the factors of the experts' outputs."""
    logits: Tensor | None = None
    """[M, R] in the spec's `logits_dtype`, when asked for."""
    shared_weights: Tensor | None = None
    """[M, num_shared_gates], like `topk_weights`: the factors of the shared experts' outputs."""
    identity_weight: Tensor | None = None
    """[M], like `topk_weights`: the sum of the chosen zero experts' weights, the factor of `hidden` itself."""

    def without_logits(self) -> Routing:
        """The same, less the logits."""
        ids, weights, _, shared, identity = self
        return tuple.__new__(Routing, (ids, weights, None, shared, identity))  # in half of the time of Routing(...)

    def into(self, out: Routing | None) -> Routing:
        """The same in other tensors.

        Args:
            out: Tensors to be filled, all that this routing has but perhaps the logits; None: this routing is returned
                as it is.

        Returns:
            The routing in the tensors of `out`; its own logits, where `out` has none.
        """
        if out is None:
            return self
        for mine, theirs in zip(self, out, strict=True):
            if mine is not None and theirs is not None:
                theirs.copy_(mine)
        return out if out.logits is not None else out._replace(logits=self.logits)


# PyTorch takes any namedtuple apart; `torch.export.save` also asks for a name to find the class by.
pytree._register_namedtuple(Routing, serialized_type_name="moegate.Routing")
