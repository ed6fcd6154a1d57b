"""What a router computes: `RouterSpec`, one frozen value for every model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from moegate.spec_values import (
    CHOICES,
    CorrectionBias,
    GateWeightDtype,
    GroupScore,
    IdsDtype,
    KeptOnce,
    LogitsDtype,
    ScoringFunc,
    WeightsDtype,
    WeightsFrom,
    check_type,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

MAX_GATE_ROWS = 1024
MAX_TOP_K = 32
_FLOAT32_RANGE = (2.0**-126, 3.4028234663852886e38)


@dataclass(frozen=True)
class RouterSpec(KeptOnce):
    """What a mixture-of-experts router computes, from `hidden` [M, K] to ids and weights [M, k].

    A spec is immutable, hashable and validated: a combination that makes no sense raises a
    `ValueError` (a value of the wrong type, a `TypeError`) that names the field, what it got and
    what is allowed. `dataclasses.replace` derives one spec from another. docs/contract.md defines
    every field's arithmetic.

    Args:
        hidden_size: K, the length of a hidden state.
        num_experts: N, the routed experts that own parameters. Zero experts and shared gates are
            counted by their own fields.
        top_k: k, the experts chosen for each token, 1 to 32.
        scoring_func: The score of a logit: softmax over the selectable experts, sigmoid,
            sqrt(softplus), or the logit itself.
        correction_bias: What `e_score_correction_bias` is added to, for the choice only (DeepSeek-V3,
            arXiv:2412.19437, eq. 16: the score; Kolibri-1: the logit). None: there is no such bias.
        n_group: Experts form this many equal groups of consecutive ids; 1 means no groups.
        topk_group: Only the experts of this many best groups can be chosen.
        group_score: What ranks a group: the sum of its two best keys (DeepSeek-V3), the best one
            (DeepSeek-V2, arXiv:2405.04434, section 2.1.2), or the sum of its j best
            (`group_limited_topk` of Megatron-LM, whose j is top_k / topk_group; Megatron-LM#4667).
        group_score_top_j: The j of "topj_sum", from 1 to the experts of a group; only with "topj_sum".
        select_per_group: From each of the n_group groups its top_k / n_group best experts are chosen
            (Pangu Pro MoE, arXiv:2505.21411; `router_n_groups` of xtuner#1209). No group is ranked, and
            topk_group must be n_group.
        weights_from: The selected experts' scores, or a softmax or sigmoid over their logits alone.
        renormalize: Divide the selected scores by their sum.
        renormalize_eps: Added to the sum of renormalize.
        renormalize_floor: The least value of the sum of renormalize (ERNIE-4.5 clamps the sum).
        routed_scaling_factor: Multiplied into the weights, last.
        logits_dtype: "bfloat16" rounds the logits once, to nearest even, before anything else.
        logit_multiplier: Multiplied into the logits before the score (Muse-Spark).
        logit_softcapping: c in c * tanh(logit / c), before the score (Laguna); None: no cap.
        linear_bias: The gate is a linear layer with a bias on the logits (gpt-oss).
        weight_dtype: "float32" says that the gate's weight is kept in float32 whatever the model's
            dtype; "model", that nothing pins it.
        topk_ids_dtype: The dtype of the returned ids. Transformers' experts take int64, and so do some of the
            dispatchers of vLLM (DeepEP).
        topk_weights_dtype: The dtype of the returned weights.
        per_expert_scale: The weights are multiplied by a learned scale of their expert (Gemma-4).
        num_zero_experts: Selectable rows behind the N experts, which stand for the identity
            (LongCat-Flash, arXiv:2509.01322): ids N to N + num_zero_experts - 1.
        num_shared_gates: Rows behind the selectable rows. They are never chosen, but their scores join the
            renormalising sum and are returned as `shared_weights` (Inkling).
        global_scale: All weights are multiplied by one learned scalar (Inkling).
        hash_routing: The ids come from a table by token id, not from the scores (DeepSeek-V4's
            first layers).
        input_norm_eps: The epsilon of an RMS norm of `hidden` before the GEMM, followed by
            `input_scale` * K**-0.5 (Gemma-4); None: no norm.
    """

    hidden_size: int
    num_experts: int
    top_k: int
    scoring_func: ScoringFunc = "softmax"
    correction_bias: CorrectionBias | None = None
    n_group: int = 1
    topk_group: int = 1
    group_score: GroupScore = "top2_sum"
    # By keyword only, so that the positions of the older fields below stay the same.
    group_score_top_j: int | None = field(default=None, kw_only=True)
    select_per_group: bool = field(default=False, kw_only=True)
    weights_from: WeightsFrom = "score"
    renormalize: bool = False
    renormalize_eps: float = 0.0
    renormalize_floor: float = 0.0
    routed_scaling_factor: float = 1.0
    logits_dtype: LogitsDtype = "float32"
    logit_multiplier: float = 1.0
    logit_softcapping: float | None = None
    linear_bias: bool = False
    weight_dtype: GateWeightDtype = "model"
    topk_ids_dtype: IdsDtype = field(default="int32", kw_only=True)
    topk_weights_dtype: WeightsDtype = "float32"
    per_expert_scale: bool = False
    num_zero_experts: int = 0
    num_shared_gates: int = 0
    global_scale: bool = False
    hash_routing: bool = False
    input_norm_eps: float | None = None
    __hash__ = KeptOnce.__hash__  # a dataclass's own would hash all fields in each call

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            check_type(each.name, str(each.type), getattr(self, each.name))
        for name, allowed in CHOICES.items():
            self._require(name, getattr(self, name) in allowed, f"one of {list(allowed)}")
        self._check_sizes()
        self._check_groups()
        self._check_weights()
        self._check_numbers()
        self._keep_text()

    @classmethod
    def from_config(
        cls, config: str | os.PathLike[str] | Mapping[str, Any] | object, *, layer: int | None = None
    ) -> RouterSpec:
        """The router of a Hugging Face model, from its `config.json`.

        A config is read as docs/configs.md says. A routing key that the router does not follow is warned of, once
        for each text.

        Args:
            config: A path to a `config.json` or to the folder that holds it, a dict, or a
                configuration object with `to_dict()`. For models whose logits have the model's dtype: a config
                without a dtype means float32 (gpt-oss: bfloat16), as in Transformers; `Gate.from_checkpoint` uses the
                dtype of the stored weight instead.
            layer: The layer, for models whose layers differ. None: the common rule if a config lists one rule for each
                layer; the rule of the layers without an entry; the rule of most layers (DeepSeek-V4).

        Returns:
            The spec. Keys that the config leaves out have the defaults of the model type's config class.

        Raises:
            TypeError: Not a config; a layer that is no int.
            ValueError: A file that is missing or broken; a model without experts; a model type that is unknown or
                out of scope; a field with neither a value nor a default; values that contradict each other.
        """
        from moegate.configs.fields import router_fields

        found = router_fields(config, layer=layer)
        try:
            return cls(**found.fields)
        except (ValueError, TypeError) as error:
            text = str(error)
            keys = [key for name, key in found.read_from.items() if f"RouterSpec.{name} " in text]
            origin = f" (read from {keys[0]})" if keys else ""
            raise ValueError(f"config of model_type {found.model_type!r}: {text}{origin}") from None

    @cached_property
    def num_selectable(self) -> int:
        """E = num_experts + num_zero_experts: the ids that can be chosen are 0..E-1."""
        return self.num_experts + self.num_zero_experts

    @cached_property
    def num_gate_rows(self) -> int:
        """Rows of the gate's weight, and logits of a token: experts, zero experts, shared gates."""
        return self.num_selectable + self.num_shared_gates

    @cached_property
    def selects_on_logits(self) -> bool:
        """True if the choice key is the logit itself.

        Every score function is monotone: without a bias the logits have the order of the scores, and saturated sigmoids
        or underflown probabilities do not tie. Groups ranked by sums of scores are the exception.
        """
        sums_scores = self.n_group > 1 and not self.select_per_group and self.group_score != "max"
        return self.correction_bias is None and not sums_scores

    @cached_property
    def num_group_score_keys(self) -> int:
        """How many of a group's best keys add up to its score: 1 for "max", 2 for "top2_sum", j for "topj_sum"."""
        if self.group_score == "topj_sum":
            assert self.group_score_top_j is not None
            return self.group_score_top_j
        return 1 if self.group_score == "max" else 2

    @cached_property
    def softmax_over_selected(self) -> bool:
        """True if the weights are a softmax over the selected logits alone.

        A softmax over all experts, renormalised over the selected ones without eps and floor, is the same number. The
        contract defines it as the softmax over the selected logits, which cannot underflow to 0/0.
        """
        renormalized_softmax = (
            self.weights_from == "score"
            and self.scoring_func == "softmax"
            and self.renormalize
            and self.renormalize_eps == 0.0
            and self.renormalize_floor == 0.0
            and self.num_shared_gates == 0
        )
        return self.weights_from == "softmax_of_selected" or renormalized_softmax

    def _check_sizes(self) -> None:
        self._require("hidden_size", self.hidden_size >= 1, "at least 1")
        self._require("num_experts", self.num_experts >= 1, "at least 1")
        for name in ("num_zero_experts", "num_shared_gates"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        rows = self.num_gate_rows
        allowed = f"at most {MAX_GATE_ROWS} rows with zero experts and shared gates, which make {rows}"
        self._require("num_experts", rows <= MAX_GATE_ROWS, allowed)
        limit = min(MAX_TOP_K, self.num_selectable)
        self._require("top_k", 1 <= self.top_k <= limit, f"1 to {limit}")

    def _check_groups(self) -> None:
        experts, groups = self.num_selectable, self.n_group
        allowed = f"a divisor of the {experts} selectable experts"
        self._require("n_group", groups >= 1 and experts % groups == 0, allowed)
        if groups == 1:
            self._require("topk_group", self.topk_group == 1, "1 when n_group is 1")
        else:
            self._require("n_group", not self.hash_routing, "1 with hash_routing, which looks no score up")
        self._require("topk_group", 1 <= self.topk_group <= groups, f"1 to {groups}")
        per_group = experts // groups
        allowed = f"enough groups of {per_group} experts to choose top_k={self.top_k} from"
        self._require("topk_group", self.topk_group * per_group >= self.top_k, allowed)
        self._check_group_score(per_group)
        if self.select_per_group:
            self._check_selection_per_group()

    def _check_group_score(self, per_group: int) -> None:
        top_j = self.group_score_top_j
        if self.group_score == "topj_sum":
            allowed = f"1 to {per_group}, the experts of a group, with group_score='topj_sum'"
            self._require("group_score_top_j", top_j is not None and 1 <= top_j <= per_group, allowed)
        else:
            self._require("group_score_top_j", top_j is None, f"None with group_score={self.group_score!r}")
        if self.group_score == "top2_sum" and self.n_group > 1 and not self.select_per_group:
            self._require("n_group", per_group >= 2, "groups of at least 2 experts for group_score='top2_sum'")

    def _check_selection_per_group(self) -> None:
        groups = self.n_group
        self._require("select_per_group", groups > 1, "False when n_group is 1")
        allowed = f"n_group={groups} with select_per_group, in which every group takes part"
        self._require("topk_group", self.topk_group == groups, allowed)
        self._require("top_k", self.top_k % groups == 0, f"a multiple of n_group={groups} with select_per_group")
        allowed = "'top2_sum', the default, with select_per_group, which ranks no group"
        self._require("group_score", self.group_score == "top2_sum", allowed)

    def _check_weights(self) -> None:
        are_logits = self.scoring_func == "identity" and self.weights_from == "score"
        if self.renormalize:
            allowed = "False with weights_from='softmax_of_selected', which sums to 1 already"
            self._require("renormalize", self.weights_from != "softmax_of_selected", allowed)
            allowed = "False with scoring_func='identity', whose sum may be zero or negative"
            self._require("renormalize", not are_logits, allowed)
        else:
            for name in ("renormalize_eps", "renormalize_floor"):
                self._require(name, getattr(self, name) == 0.0, "0.0 without renormalize")
        if self.num_shared_gates:
            has_scores = self.scoring_func in ("sigmoid", "sqrtsoftplus") and self.weights_from == "score"
            allowed = "0, unless renormalize joins them to weights_from='score' with a sigmoid or sqrtsoftplus"
            self._require("num_shared_gates", self.renormalize and has_scores, allowed)
        if self.hash_routing:
            self._require("correction_bias", self.correction_bias is None, "None with hash_routing")
        if self.num_zero_experts:
            allowed = "0 with scoring_func='identity', whose weights have no finite sum"
            self._require("num_zero_experts", not are_logits, allowed)
            allowed = "False with zero experts, which have no parameters"
            self._require("per_expert_scale", not self.per_expert_scale, allowed)

    def _check_numbers(self) -> None:
        smallest, largest = _FLOAT32_RANGE
        for name in ("renormalize_eps", "renormalize_floor"):
            self._require(name, 0.0 <= getattr(self, name) <= largest, "0 or more, a float32")
        for name in ("routed_scaling_factor", "logit_multiplier"):
            self._require(name, smallest <= getattr(self, name) <= largest, "above 0, a normal float32")
        for name in ("logit_softcapping", "input_norm_eps"):
            value = getattr(self, name)
            holds = value is None or smallest <= value <= largest
            self._require(name, holds, "None, or above 0, a normal float32")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        """Raises a `ValueError` that names the field and what is allowed, unless the condition holds."""
        if not holds:
            raise ValueError(f"RouterSpec.{name} = {getattr(self, name)!r}; allowed: {allowed}")
