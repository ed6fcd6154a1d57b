"""`Gate`: a router with its tensors, as a module."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moegate import arguments, ops
from moegate.choice.plan import Explanation, log
from moegate.choice.planned import planned
from moegate.routing import RouterTensors, Routing
from moegate.spec import RouterSpec


class Gate(nn.Module):
    """The router of one layer.

    Parameters and buffers carry the names of checkpoints: `weight`, `bias`, `e_score_correction_bias`,
    `per_expert_scale`, `global_scale`, `tid2eid` (and `input_scale`, Gemma-4's `scale`); those that
    the spec does not ask for are None. The correction bias, and a weight that the spec pins to float32,
    stay in float32 whatever dtype the module is cast to.

    The gate reads the very tensors it was given, so that updates in place take effect. With
    `frozen=True` it may also keep what it made of them (on a CPU, the weight in the layout of its
    product): then nobody may change them without calling `refresh()`, which the module's own `to()`
    and `load_state_dict()` do.

    Args:
        spec: What the router computes. The tensors below must be given just when it asks for them.
        weight: [R, K] bfloat16, float16 or float32 (only float32 if the spec pins it), with the rows
            of the experts, the zero experts and the shared gates in this order.
        bias: [R], the linear bias; bfloat16, float16 or float32, as all that have no dtype here.
        e_score_correction_bias: [num_experts + num_zero_experts]; half precision is widened to float32.
        input_scale: [K], of the input norm.
        per_expert_scale: [num_experts].
        global_scale: [1].
        tid2eid: [vocabulary, top_k] int32 or int64, the experts of each token id, distinct in a row.
        frozen: The tensors change only together with a call of `refresh()`.
        pdl: On a GPU, start before the kernel in front ends (programmatic dependent launch) and wait for
            it just before reading `hidden`. False: start when it has ended.
        backend: "torch", "cuda" or "flashinfer": only this one runs. FlashInfer's kernels do not keep all of
            docs/contract.md. None: the policy chooses.
        policy: "measured": the fastest kernels that keep the contract, by measured times. "sglang": SGLang's
            rule of April 2026 (docs/choice.md).

    Raises:
        TypeError: Not a tensor, or a dtype that is not allowed.
        ValueError: A shape, stride or device that is not allowed, a tensor that the spec does not ask
            for or one missing, a hash table with an expert out of range or twice in a row; an unknown
            backend or policy, or a backend that cannot run here.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    input_scale: nn.Parameter | None
    per_expert_scale: nn.Parameter | None
    global_scale: nn.Parameter | None
    e_score_correction_bias: Tensor | None
    tid2eid: Tensor | None

    def __init__(
        self,
        spec: RouterSpec,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        e_score_correction_bias: Tensor | None = None,
        input_scale: Tensor | None = None,
        per_expert_scale: Tensor | None = None,
        global_scale: Tensor | None = None,
        tid2eid: Tensor | None = None,
        frozen: bool = False,
        pdl: bool = True,
        backend: str | None = None,
        policy: str = "measured",
    ) -> None:
        super().__init__()
        arguments.check_spec(spec)
        weight = arguments.check_weight(weight, spec)
        if isinstance(e_score_correction_bias, Tensor) and e_score_correction_bias.dtype in arguments.FLOATS:
            e_score_correction_bias = e_score_correction_bias.detach().float()
        tensors = RouterTensors(bias, e_score_correction_bias, input_scale, per_expert_scale, global_scale, tid2eid)
        arguments.check_tensors(spec, tensors, weight.device)

        self.spec = spec
        self.frozen = frozen
        self.pdl = pdl
        self.backend, self.policy = backend, policy
        self._spec_text = ops.spec_text(spec)
        self.register_parameter("weight", _parameter(weight))
        for name in ("bias", "input_scale", "per_expert_scale", "global_scale"):
            self.register_parameter(name, _parameter(getattr(tensors, name)))
        self.register_buffer("e_score_correction_bias", e_score_correction_bias)
        self.register_buffer("tid2eid", tid2eid)
        self.register_load_state_dict_post_hook(_refresh_after_load)  # type: ignore[no-untyped-call]
        self.refresh()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        layer: int,
        *,
        spec: RouterSpec | Callable[[RouterSpec], RouterSpec] | None = None,
        tensors: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        frozen: bool = True,
        backend: str | None = None,
        policy: str = "measured",
    ) -> Gate:
        """The gate of a layer of a local Hugging Face checkpoint.

        Reads the config and, through the index if the checkpoint is sharded, only this gate's tensors. A float8 weight
        is multiplied by its scale (one number, one a row or one a block) in float32. Then it is rounded to the model's
        dtype, which it had before it was quantised (bfloat16 if the config states none), unless the spec pins float32.

        Args:
            path: The folder with `config.json` and the safetensors files, or one of these files.
            layer: The layer, counted as the checkpoint counts.
            spec: What the router computes, where the config does not say so or you want another:
                a `RouterSpec`, with which no config is needed, or a function from the one that was found to another,
                such as `lambda found: dataclasses.replace(found, logits_dtype="float32")`.
            tensors: Names of tensors that have none that the catalog knows, by role: `weight`, `bias`,
                `e_score_correction_bias`, `input_scale`, `per_expert_scale`, `global_scale`, `tid2eid`. A full name,
                in which {layer} stands for the layer, or what stands behind "layers.3.".
            device: Where the gate's tensors go.
            frozen: See the class; nobody else holds the tensors that were read here.
            backend: See the class.
            policy: See the class.

        Raises:
            TypeError: A layer that is no int, a spec that is none, names that are no str.
            ValueError: A missing, broken or unknown config; a missing, corrupt or truncated file, or one outside the
                folder; a layer without a router (the message names those that have one); a gate in a quantised format
                other than float8, or with an adapter; a tensor that is missing or there twice, or has another shape
                than the spec says; a bias in the layer that the spec does not take; an unknown backend or policy, or a
                backend that cannot run there.
        """
        (gate,) = cls.all_from_checkpoint(
            path, (layer,), spec=spec, tensors=tensors, device=device, frozen=frozen, backend=backend, policy=policy
        ).values()
        return gate

    @classmethod
    def all_from_checkpoint(
        cls,
        path: str | os.PathLike[str],
        layers: Iterable[int] | None = None,
        *,
        spec: RouterSpec | Callable[[RouterSpec], RouterSpec] | None = None,
        tensors: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        frozen: bool = True,
        backend: str | None = None,
        policy: str = "measured",
    ) -> dict[int, Gate]:
        """The gates of many layers of a local checkpoint, by layer: one pass over its names, each file opened once.

        Args:
            path: As in `from_checkpoint`.
            layers: The layers; None: all that have a router, less those past the config's number of layers, which
                predict further tokens.
            spec: For all layers; a function is called for each.
            tensors: For all layers, so that a full name has {layer} in it.
            device: As there.
            frozen: As there.
            backend: As there.
            policy: As there.

        Raises:
            TypeError: As there.
            ValueError: As there; or no layer has a router.
        """
        from moegate.catalog.checkpoint import Checkpoint

        gates = {}
        for number, (found, read) in Checkpoint(path, spec, tensors).read_all(layers):
            there: dict[str, Any] = {name: tensor.to(device) for name, tensor in read.items()}
            gates[number] = cls(found, **there, frozen=frozen, backend=backend, policy=policy)
        return gates

    def forward(
        self,
        hidden: Tensor,
        *,
        input_ids: Tensor | None = None,
        return_logits: bool = False,
        out: Routing | None = None,
    ) -> Routing:
        """Routes M tokens.

        Args:
            hidden: [M, K] bfloat16, float16 or float32, on the gate's device; M may be 0.
            input_ids: [M] int32 or int64, the token ids, just for hash routing.
            return_logits: Also return the logits [M, R] in the spec's `logits_dtype`.
            out: Contiguous tensors to be filled and returned, such as an earlier call with as many tokens gave. With
                logits among them, a call of the `cuda` backend with up to 64 tokens allocates nothing.

        Returns:
            A `Routing`. No gradient flows through it.

        Raises:
            TypeError: Not a tensor, or a dtype that is not allowed.
            ValueError: A shape, stride or device that is not allowed; on a CPU, a token id outside
                the table.
        """
        weight, tensors = self._tensors()
        arguments.check_hidden(hidden, self.spec, weight.device)
        if input_ids is not None or self.spec.hash_routing:
            arguments.check_input_ids(input_ids, self.spec, tensors, hidden.shape[0], weight.device)
        if out is not None:
            arguments.check_out(out, self.spec, hidden.shape[0], weight.device)
        if torch.compiler.is_compiling():
            routing = ops.route(
                hidden.detach(),
                weight.detach(),
                self.spec,
                self._spec_text,
                tensors.detach(),
                input_ids,
                frozen=self.frozen,
                pdl=self.pdl,
                backend=self.backend,
                policy=self.policy,
            ).into(out)
        else:
            had_grad = torch.is_grad_enabled()
            try:
                torch._C._set_grad_enabled(False)  # all that torch.no_grad() comes to, in a tenth of its time
                routing = self._backend.route(hidden, weight, self.spec, tensors, input_ids, self._prepared, out)
            finally:
                torch._C._set_grad_enabled(had_grad)
        return routing if return_logits else routing.without_logits()

    def warmup(self, *hidden_dtypes: torch.dtype) -> None:
        """Routes one token in each of these dtypes of `hidden`, so that nothing is left to be compiled later.

        Args:
            hidden_dtypes: bfloat16, float16 or float32.

        Raises:
            TypeError: Another dtype.
        """
        weight = self.weight
        ids = torch.zeros(1, dtype=torch.int64, device=weight.device) if self.spec.hash_routing else None
        for dtype in hidden_dtypes:
            self(torch.zeros((1, self.spec.hidden_size), dtype=dtype, device=weight.device), input_ids=ids)

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes note of changed tensors, after an update in place of a frozen gate, and checks them as at first."""
        bias = self.e_score_correction_bias
        if bias is not None and bias.dtype in (torch.bfloat16, torch.float16):
            self.e_score_correction_bias = bias.float()
        weight, tensors = self._tensors()
        arguments.check_weight(weight, self.spec)
        arguments.check_tensors(self.spec, tensors, weight.device)
        if tensors.tid2eid is not None and not tensors.tid2eid.is_meta:
            arguments.check_table(tensors.tid2eid, self.spec)
        before = self.__dict__.get("_plan")
        self._plan, self._backend = planned(
            weight.device,
            self.spec,
            weight.dtype,
            None if tensors.bias is None else tensors.bias.dtype,
            frozen=self.frozen,
            policy=self.policy,
            backend=self.backend,
        )
        if self._plan is not before:
            log(self._plan)
        if self.frozen and weight.is_cuda:
            # Calls load a frozen weight without a wait for the kernel in front. What is enqueued here starts when all
            # before it has ended, whoever wrote the weight among it, and ends before a call starts.
            torch.zeros(1, device=weight.device)
        self._prepared = self._backend.prepare(weight.detach(), self.spec, tensors, frozen=self.frozen, pdl=self.pdl)

    def explain(self, num_tokens: int) -> Explanation:
        """Which kernels run for so many tokens, the time to expect, on what evidence, and why no others.

        Args:
            num_tokens: M, 0 or more; with hidden states of the weight's dtype (bfloat16 for a float32 weight).

        Raises:
            TypeError: Not an int.
            ValueError: A negative number; or the gate's `backend` cannot route so many.
        """
        return self._plan.explain(num_tokens)

    def extra_repr(self) -> str:
        """What the router computes, in a line."""
        spec = self.spec
        size = f"hidden_size={spec.hidden_size}, num_experts={spec.num_experts}, top_k={spec.top_k}"
        return f"{size}, scoring_func={spec.scoring_func!r}, backend={self._backend.name!r}, frozen={self.frozen}"

    def _tensors(self) -> tuple[Tensor, RouterTensors]:
        parameters, buffers = self._parameters, self._buffers  # nn.Module's own attribute look-up is slow
        weight = parameters["weight"]
        assert weight is not None
        return weight, RouterTensors(
            parameters["bias"],
            buffers["e_score_correction_bias"],
            parameters["input_scale"],
            parameters["per_expert_scale"],
            parameters["global_scale"],
            buffers["tid2eid"],
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Moves and casts like any module, less the casts that would change the choice of experts."""
        pinned = ["e_score_correction_bias"] + ["weight"] * (self.spec.weight_dtype == "float32")
        before = {name: tensor.detach() for name in pinned if (tensor := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in before.items():
            now = getattr(self, name)
            if now.dtype != torch.float32:
                now.data = tensor.to(now.device)
        self.refresh()
        return self

    def __getstate__(self) -> dict[str, Any]:
        # What was prepared may be in a layout that nothing can copy, and a plan is of its machine; they are made again.
        return {**self.__dict__, "_prepared": None, "_backend": None, "_plan": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.refresh()


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=tensor.requires_grad)


def _refresh_after_load(gate: Gate, incompatible_keys: object) -> None:
    gate.refresh()
