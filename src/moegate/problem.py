"""A problem: what is routed, in which dtypes, on which machine. All that is compiled, planned or kept depends on it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moegate.machine import Machine
from moegate.routing import RouterTensors
from moegate.spec import RouterSpec


class Dtypes(NamedTuple):
    """The dtypes of what a route reads; None: there is no such tensor."""

    hidden: torch.dtype
    weight: torch.dtype
    bias: torch.dtype | None = None
    input_scale: torch.dtype | None = None
    per_expert_scale: torch.dtype | None = None
    global_scale: torch.dtype | None = None
    tid2eid: torch.dtype | None = None
    input_ids: torch.dtype | None = None
    padding: torch.dtype | None = None

    def __str__(self) -> str:
        """As in "bfloat16 hidden, float32 weight"."""
        return ", ".join(f"{short(dtype)} {name}" for name, dtype in self._asdict().items() if dtype is not None)


class Problem(NamedTuple):
    """A route on a machine: the key of all that is kept. The number of tokens is no part of a problem."""

    machine: Machine
    spec: RouterSpec
    dtypes: Dtypes
    frozen: bool = True
    """The tensors are declared constant, so that kernels may load them early."""
    pdl: bool = True
    """Kernels may start before the kernel in front of them ends (programmatic dependent launch)."""

    @property
    def logits_dtype(self) -> torch.dtype:
        """Of the logits."""
        return getattr(torch, self.spec.logits_dtype)  # type: ignore[no-any-return]

    def given(
        self, hidden: torch.dtype, input_ids: torch.dtype | None = None, padding: torch.dtype | None = None
    ) -> Problem:
        """The same for a call's hidden states, token ids and padding."""
        if (hidden, input_ids, padding) == (self.dtypes.hidden, self.dtypes.input_ids, self.dtypes.padding):
            return self
        return self._replace(dtypes=self.dtypes._replace(hidden=hidden, input_ids=input_ids, padding=padding))

    def __str__(self) -> str:
        """One line: shape, dtypes, what is declared, machine."""
        spec = self.spec
        size = f"{spec.hidden_size} x {spec.num_gate_rows}, top {spec.top_k}"
        declared = f"{'frozen' if self.frozen else 'not frozen'}{'' if self.pdl else ', without PDL'}"
        return f"{size}; {self.dtypes}; {declared}; {self.machine.name}"


def dtypes_of(spec: RouterSpec, weight_dtype: torch.dtype, tensors: RouterTensors | None = None) -> Dtypes:
    """The dtypes of a gate: hidden states in its weight's dtype, bfloat16 beside a float32 weight.

    `tensors` are the gate's; None: what the spec asks for is in the dtype of the hidden states, tables are int64.
    """
    hidden = weight_dtype if weight_dtype != torch.float32 else torch.bfloat16
    input_ids = torch.int64 if spec.hash_routing else None
    if tensors is not None:
        bias, _, input_scale, per_expert_scale, global_scale, tid2eid = tensors  # the correction bias is always float32
        return Dtypes(
            hidden,
            weight_dtype,
            None if bias is None else bias.dtype,
            None if input_scale is None else input_scale.dtype,
            None if per_expert_scale is None else per_expert_scale.dtype,
            None if global_scale is None else global_scale.dtype,
            None if tid2eid is None else tid2eid.dtype,
            input_ids,
        )
    return Dtypes(
        hidden,
        weight_dtype,
        hidden if spec.linear_bias else None,
        hidden if spec.input_norm_eps is not None else None,
        hidden if spec.per_expert_scale else None,
        hidden if spec.global_scale else None,
        input_ids,
        input_ids,
    )


def problem_of(machine: Machine, spec: RouterSpec, weight_dtype: torch.dtype, *, frozen: bool = True) -> Problem:
    """The problem of a gate whose small tensors are in the dtype of its hidden states."""
    return Problem(machine, spec, dtypes_of(spec, weight_dtype), frozen)


def default_weight_dtype(spec: RouterSpec) -> torch.dtype:
    """The dtype of a gate's weight where nobody says another: bfloat16, unless the spec pins it."""
    return torch.float32 if spec.weight_dtype == "float32" else torch.bfloat16


def short(dtype: torch.dtype) -> str:
    """A dtype without "torch."."""
    return str(dtype).removeprefix("torch.")
