"""What goes into a router beside `hidden` and its weight, and what comes out."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree


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
    """[M, k] int32: distinct ids in 0..E-1, by key, best first (hash routing: in the table's order)."""
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
        """The same in the tensors of `out`, which has all that this has but perhaps the logits; None: as it is."""
        if out is None:
            return self
        for mine, theirs in zip(self, out, strict=True):
            if mine is not None and theirs is not None:
                theirs.copy_(mine)
        return out if out.logits is not None else out._replace(logits=self.logits)


# PyTorch takes any namedtuple apart; `torch.export.save` also asks for a name to find the class by.
pytree._register_namedtuple(Routing, serialized_type_name="moegate.Routing")
