"""`TopK` with moegate in its plugin's slot, beside SGLang's own selection of the same logits."""

from __future__ import annotations

from typing import Any

import pytest
import sglang_layers
import torch
from sglang_cases import CASES, SCALE
from sglang_layers import (
    EXPERTS,
    GROUPED,
    HIDDEN,
    TOP_K,
    as_routing,
    backend_of,
    bias_of,
    hidden_of,
    logits_of,
    top_k_of,
)

import moegate
from moegate import RouterSpec
from moegate.contract.verify import verify_routing
from moegate.routing import RouterTensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 200])
@pytest.mark.parametrize("name", CASES)
def test_ids_and_weights_beside_sglangs_own(name: str, tokens: int, dtype: torch.dtype) -> None:
    arguments, has_bias, fields = CASES[name]
    bias = bias_of(1) if has_bias else None
    spec = RouterSpec(HIDDEN, EXPERTS, TOP_K, **fields)
    tensors = RouterTensors(e_score_correction_bias=bias)
    top_k, hidden, logits = top_k_of(bias, **arguments), hidden_of(tokens), logits_of(tokens, dtype=dtype)

    backend, ours = backend_of(top_k, hidden, logits)
    rounds_scores = arguments.get("use_grouped_topk") and not has_bias and dtype == torch.bfloat16
    assert backend == ("torch" if rounds_scores else "plugin")
    if rounds_scores:  # by SGLang, since its scores would be bfloat16
        return
    assert ours.router_logits is logits
    assert ours.topk_ids.dtype == torch.int32
    assert ours.topk_weights.dtype == torch.float32
    routing = moegate.Routing(ours.topk_ids, ours.topk_weights)
    assert not verify_routing(routing, logits, spec, tensors).problems

    if dtype == torch.bfloat16 and has_bias:
        logits = logits.float()  # SGLang's selection for CPUs would round the scores
    theirs = as_routing(sglang_layers.own(top_k, hidden, logits), logits, spec, tensors)
    verdict = verify_routing(theirs, logits.float(), spec, tensors)
    assert not [problem for problem in verdict.problems if "other ids" not in problem]
    if dtype == torch.float32:
        assert theirs.topk_ids.equal(routing.topk_ids)
        torch.testing.assert_close(theirs.topk_weights, routing.topk_weights, rtol=1e-5, atol=1e-7)


def test_rows_of_padding() -> None:
    top_k, hidden, logits = top_k_of(bias_of(1), **GROUPED), hidden_of(6), logits_of(6)
    whole = top_k(hidden, logits)
    backend, padded = backend_of(top_k, hidden, logits, num_token_non_padded=torch.tensor(4, dtype=torch.int32))
    assert backend == "plugin"
    assert padded.topk_ids[:4].equal(whole.topk_ids[:4])
    assert (padded.topk_ids[4:] == -1).all()
    assert padded.topk_weights.equal(whole.topk_weights)  # SGLang leaves the weights of padding as they are


@pytest.mark.parametrize("arguments", [{}, SCALE, {"routed_scaling_factor": 2.5}], ids=str)
def test_the_column_of_a_shared_expert(arguments: dict[str, Any]) -> None:
    from sglang.srt.configs.shared_experts import SharedExpertsConfig

    top_k, hidden, logits = top_k_of(bias_of(1), top_k=TOP_K + 1, **GROUPED, **arguments), hidden_of(5), logits_of(5)
    top_k.topk_config.shared_experts = SharedExpertsConfig(num_fused_shared_experts=1)
    backend, ours = backend_of(top_k, hidden, logits)
    assert backend == "plugin"
    theirs = sglang_layers.own(top_k, hidden, logits)
    assert (ours.topk_ids[:, -1] == EXPERTS).all()
    assert ours.topk_ids.sort().values.equal(theirs.topk_ids.sort().values)
    assert ours.topk_weights.shape == (5, TOP_K + 1)
    torch.testing.assert_close(ours.topk_weights[:, -1], theirs.topk_weights[:, -1])
    torch.testing.assert_close(ours.topk_weights.sort().values, theirs.topk_weights.sort().values)


def test_the_map_of_eplb_and_the_capture_of_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo
    from sglang.srt.layers.moe import topk

    captured: list[torch.Tensor] = []

    class Capturer:
        def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
            assert layer_id == 3
            captured.append(topk_indices.clone())

    physical = torch.randperm(EXPERTS, generator=torch.Generator().manual_seed(0)).int()
    info = ExpertLocationDispatchInfo(
        ep_dispatch_algorithm="static",
        rank_invariant=False,
        partial_logical_to_rank_dispatch_physical_map=physical,
        partial_logical_to_all_physical_map=physical[:, None],
        partial_logical_to_all_physical_map_num_valid=torch.ones(EXPERTS),
        num_physical_experts=EXPERTS,
    )
    top_k, hidden, logits = top_k_of(bias_of(1), **GROUPED), hidden_of(5), logits_of(5)
    logical = top_k(hidden, logits).topk_ids
    monkeypatch.setattr(topk, "get_global_experts_capturer", Capturer)
    backend, output = backend_of(top_k, hidden, logits, expert_location_dispatch_info=info)
    assert backend == "plugin"
    assert output.topk_ids.equal(physical[logical.long()])
    assert len(captured) == 1
    assert captured[0].equal(logical)


def test_a_bias_that_is_written_or_replaced_takes_effect() -> None:
    top_k, hidden, logits = top_k_of(bias_of(1), **GROUPED), hidden_of(5), logits_of(5)
    top_k(hidden, logits)
    with torch.no_grad():
        top_k.topk_config.correction_bias.data.copy_(bias_of(2))
    assert top_k(hidden, logits).topk_ids.equal(top_k_of(bias_of(2), **GROUPED)(hidden, logits).topk_ids)
    top_k.topk_config.correction_bias.data = bias_of(3)
    assert top_k(hidden, logits).topk_ids.equal(top_k_of(bias_of(3), **GROUPED)(hidden, logits).topk_ids)
    top_k.topk_config.correction_bias = bias_of(4)
    assert top_k(hidden, logits).topk_ids.equal(top_k_of(bias_of(4), **GROUPED)(hidden, logits).topk_ids)


def test_a_forced_backend_that_cannot_run_falls_back() -> None:
    from sglang.kernels.fused_op import set_fused_op_backend
    from sglang.kernels.spec import KernelBackend

    top_k, hidden, logits = top_k_of(None), hidden_of(5), logits_of(5, dtype=torch.float16)
    set_fused_op_backend(KernelBackend.PLUGIN)
    try:
        backend, _ = backend_of(top_k, hidden, logits)
    finally:
        set_fused_op_backend(None)
    assert backend == "torch"
