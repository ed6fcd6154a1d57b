"""vLLM's routers, each against moegate's selection on the same logits."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import vllm_layers
from torch import Tensor
from vllm.model_executor.layers.fused_moe.router import fused_topk_bias_router, grouped_topk_router
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter
from vllm_layers import EXPERTS, HIDDEN, ROUTERS, hold_engine, runner_of, tensors_of

from moegate import Routing
from moegate.contract.verify import verify_routing
from moegate.integrations.takeover import LeftToEngineError
from moegate.integrations.vllm.adapter import rule_of
from moegate.integrations.vllm.routed_layer import take_over

TOKENS = 200
# vLLM's kernels for these routers need a GPU, and it has no other code for them.
ONLY_ON_A_GPU = {"softmax", "softmax, renormalised", "sigmoid", "sqrtsoftplus"}
pytestmark = pytest.mark.usefixtures("vllm_config")


def logits(dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits whose best experts are, in float32, well apart."""
    return torch.randn(TOKENS, EXPERTS, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selection(name: str, dtype: torch.dtype) -> None:
    make, spec = ROUTERS[name]
    router = make()
    assert take_over(runner_of(router)) == "selection alone: the model calls the gate itself"
    weights, ids = router._compute_routing(torch.zeros(TOKENS, HIDDEN), logits(dtype), None)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    verdict = verify_routing(Routing(ids, weights), logits(dtype), spec, tensors_of(router))
    assert not verdict.problems


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in ONLY_ON_A_GPU])
def test_what_vllm_selects(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specs that test_selection goes by are those of vLLM's own routers, wherever these run on a CPU."""
    aiter = fused_topk_bias_router.rocm_aiter_ops
    monkeypatch.setattr(aiter, "is_fused_moe_enabled", lambda: "with a bias" in name)  # behind it is plain PyTorch
    monkeypatch.setattr(fused_topk_bias_router, "_aiter_can_use_biased_grouped_topk", lambda *_: False)
    # vLLM compiles this function, which would take longer than all other tests.
    monkeypatch.setattr(grouped_topk_router, "grouped_topk", inspect.unwrap(grouped_topk_router.grouped_topk))
    make, spec = ROUTERS[name]
    router = make()
    weights, ids = router._compute_routing(torch.zeros(TOKENS, HIDDEN), logits(), None)
    hold_engine(ids, weights, logits(), spec, tensors_of(router))


def test_every_router_class_is_covered() -> None:
    from moegate.integrations.vllm.adapter import _KNOWN

    made = {f"{type(make()).__module__}.{type(make()).__name__}" for make, _ in ROUTERS.values()}
    assert made == set(_KNOWN)


def test_ids_in_int64() -> None:
    router = ROUTERS["groups"][0]()
    take_over(runner_of(router, topk_indices_dtype=torch.int64))
    weights, ids = router._compute_routing(torch.zeros(TOKENS, HIDDEN), logits(), torch.int64)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)


def test_vllm_captures_logical_ids() -> None:
    router = ROUTERS["groups"][0]()
    take_over(runner_of(router))
    captured: list[Tensor] = []
    router.set_capture_fn(captured.append)
    _, ids = router.select_experts(torch.zeros(TOKENS, HIDDEN), logits())
    assert captured[0].equal(ids)


def test_a_bias_that_moves_is_followed() -> None:
    """Offloading gives a parameter other memory, and a reload writes into it where no version counts."""
    router = ROUTERS["sigmoid with a bias"][0]()
    router.e_score_correction_bias = torch.nn.Parameter(router.e_score_correction_bias, requires_grad=False)
    take_over(runner_of(router))
    router.e_score_correction_bias.data = torch.full((EXPERTS,), -1.0)
    router.e_score_correction_bias.data[7] = 9.0
    _, ids = router._compute_routing(torch.zeros(TOKENS, HIDDEN), logits(), None)
    assert (ids[:, 0] == 7).all()


def test_other_logits_go_to_vllm() -> None:
    router = ROUTERS["softmax on a CPU"][0]()
    take_over(runner_of(router))
    with_more_experts = torch.randn(3, EXPERTS + 1)
    with_more_experts[:, EXPERTS] = 9.0
    _, ids = router._compute_routing(torch.zeros(3, HIDDEN), with_more_experts, None)
    assert (ids == EXPERTS).any(dim=-1).all()


def zero_experts() -> Any:
    from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

    return ZeroExpertRouter(4, EXPERTS, vllm_layers.bias(), 24, "identity")


def custom() -> Any:
    from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

    return CustomRoutingRouter(4, EXPERTS, lambda **_: None)


def simulator() -> Any:
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import RoutingSimulatorRouter

    return RoutingSimulatorRouter.__new__(RoutingSimulatorRouter)  # what it is made of differs between versions


def subclass() -> Any:
    class Mine(FusedTopKRouter):  # type: ignore[misc]
        pass

    return Mine(4, EXPERTS)


def patched() -> Any:
    router = ROUTERS["softmax"][0]()
    router._compute_routing = router._compute_routing
    return router


def grouped(groups: int) -> Any:
    return GroupedTopKRouter(4, EXPERTS, groups, 1)


def biased(**options: Any) -> Any:
    return FusedTopKBiasRouter(4, EXPERTS, **{"e_score_correction_bias": vllm_layers.bias(), **options})


def on_cpu(**options: Any) -> Any:
    return CPURouter(4, EXPERTS, **options)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (zero_experts, "zero experts"),
        (custom, "custom routing function"),
        (simulator, "simulated routing"),
        (subclass, "unknown router Mine"),
        (patched, "unknown router FusedTopKRouter"),
        (lambda: grouped(5), "32 experts in 5 groups"),
        (lambda: grouped(32), "32 experts in 32 groups"),
        (lambda: biased(num_fused_shared_experts=1), "fused shared experts"),
        (lambda: biased(hash_indices_table=torch.zeros(9, 4)), "hash routing"),
        (lambda: biased(bias_vl=vllm_layers.bias()), "a correction bias by row"),
        (
            lambda: biased(e_score_correction_bias=vllm_layers.bias().bfloat16()),
            "a correction bias in bfloat16",
        ),
        (lambda: on_cpu(custom_routing_function=print), "custom routing function"),
        (lambda: on_cpu(e_score_correction_bias=vllm_layers.bias()), "softmax with a correction bias on a CPU"),
        (
            lambda: on_cpu(routed_scaling_factor=2.0),
            "a scaling factor that vLLM's router for CPUs leaves out",
        ),
    ],
)
def test_left_to_vllm(make: Any, reason: str) -> None:
    router = make()
    before = router._compute_routing
    with pytest.raises(LeftToEngineError, match=f"^{reason}$"):
        take_over(runner_of(router))
    assert router._compute_routing == before


def test_a_parameter_that_is_new_in_vllm() -> None:
    class Newer(FusedTopKRouter):  # type: ignore[misc]
        def __init__(self, top_k: int, global_num_experts: int, temperature: float = 2.0) -> None:
            super().__init__(top_k, global_num_experts)

    Newer.__module__, Newer.__name__ = FusedTopKRouter.__module__, FusedTopKRouter.__name__
    with pytest.raises(LeftToEngineError, match=r"^unknown parameter temperature of FusedTopKRouter$"):
        rule_of(Newer(4, EXPERTS), EXPERTS)


def test_a_router_that_no_spec_has() -> None:
    with pytest.raises(LeftToEngineError, match="num_experts"):
        take_over(runner_of(ROUTERS["softmax"][0](), num_logical_experts=4096))
