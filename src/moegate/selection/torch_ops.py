"""PyTorch's operations: logits to experts and weights, on every device that PyTorch has."""

from __future__ import annotations

import torch
from torch import Tensor

from moegate.chunks import are_many, in_chunks
from moegate.contract.limits import FLOAT32_MAX
from moegate.halves import BoundGemm, Call, Logits, Selection
from moegate.problem import Problem
from moegate.routing import RouterTensors, Routing
from moegate.selection.cpu_rows import known_finite, select_few_plain_rows
from moegate.selection.formulas import choice_keys, mask_groups, routing_of, weights_of
from moegate.selection.padding import with_padding
from moegate.selection.top_k import top_k, top_k_per_group
from moegate.spec import RouterSpec


class TorchOps(Selection):
    """Runs everything, everywhere."""

    def name_of(self, problem: Problem) -> str:
        """What users call it."""
        return "ops"

    def bind(self, problem: Problem, device: torch.device, gemm: BoundGemm | None) -> BoundOps:
        """Nothing is to be compiled."""
        assert gemm is None or gemm.num_terms == 0
        return BoundOps(problem.spec)


TORCH_OPS = TorchOps()


class BoundOps:
    """The selection of one spec. On a CPU many rows are selected some at a time."""

    def __init__(self, spec: RouterSpec) -> None:
        self._spec = spec

    def __call__(self, call: Call, logits: Logits) -> Routing:
        """The routing, with its logits."""
        assert isinstance(logits, Tensor)
        routing = self._select(logits, call.tensors, call.input_ids)
        return with_padding(routing, call.padding).into(call.out)

    def _select(self, logits: Tensor, tensors: RouterTensors, input_ids: Tensor | None) -> Routing:
        spec = self._spec
        if not are_many(logits):
            return select(logits, spec, tensors, input_ids)

        def compute(rows: slice) -> Routing:
            ids = None if input_ids is None else input_ids[rows]
            return select(logits[rows], spec, tensors, ids).without_logits()

        return in_chunks(len(logits), spec.num_gate_rows, compute)._replace(logits=logits)


def select(logits: Tensor, spec: RouterSpec, tensors: RouterTensors, input_ids: Tensor | None) -> Routing:
    """Logits [M, R], float32 or bfloat16, to the routing, which carries them."""
    routing = select_few_plain_rows(logits, spec, tensors)
    if routing is not None:
        return routing

    finite, row_is_nan = logits.float(), None
    if not known_finite(finite):
        row_is_nan = finite.amax(dim=-1, keepdim=True).isnan()  # a maximum carries a NaN on, in one pass
        finite = finite.nan_to_num(nan=-FLOAT32_MAX)
    scores = None
    if spec.hash_routing:
        ids, outside = _look_up(input_ids, tensors.tid2eid)
        row_is_nan = outside if row_is_nan is None else row_is_nan | outside
    else:
        keys, scores = choice_keys(finite, spec, tensors)
        if not spec.selects_on_logits:
            keys = keys.nan_to_num(nan=-FLOAT32_MAX)
        # -FLOAT32_MAX, which stands for NaN and -inf, is no bfloat16 value.
        coarse = logits.dtype == torch.bfloat16 and spec.selects_on_logits and row_is_nan is None
        if spec.select_per_group:
            _, ids = top_k_per_group(keys, spec.n_group, spec.top_k, coarse=coarse)
        else:
            ids = top_k(mask_groups(keys, spec), spec.top_k, coarse=coarse)
    weights, shared = weights_of(ids, None, finite, scores, spec, tensors)
    return routing_of(ids, weights, logits, shared, row_is_nan, spec)


def _look_up(input_ids: Tensor | None, table: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token ids [M] -> expert ids [M, k], and a mask [M, 1] of the token ids outside the table.

    On a CPU an id outside the table was refused before. A GPU cannot be asked without waiting for
    it: there such an id reads the nearest row of the table, and its weights become NaN.
    """
    assert input_ids is not None and table is not None
    rows = input_ids.long()
    outside = (rows < 0) | (rows >= table.shape[0])
    return table[rows.clamp(0, table.shape[0] - 1)].long(), outside.unsqueeze(-1)
