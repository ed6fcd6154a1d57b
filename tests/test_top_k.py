"""`TopK`: the prepared selection of a router."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from on_device import all_there, back, there
from routers import SPECS, generator, tensors_of, token_ids
from torch import Tensor

import moegate
from moegate import RouterSpec, Routing, TopK

NAMES = ("e_score_correction_bias", "per_expert_scale", "global_scale", "tid2eid")
BIASED = SPECS["sigmoid with bias in groups"]
ROWS = (0, 1, 5, 64, 700)


def given_to(spec: RouterSpec) -> dict[str, Any]:
    return {name: part for name in NAMES if (part := getattr(tensors_of(spec), name)) is not None}


def a_top_k(spec: RouterSpec = BIASED, **given: Any) -> TopK:
    return TopK(spec, **all_there(given or given_to(spec)))


def random_logits(spec: RouterSpec, rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, spec.num_gate_rows, generator=generator(rows)).to(dtype)


def is_same(mine: Routing, theirs: Routing) -> bool:
    return all(
        one is two is None or (one is not None and two is not None and one.equal(two))
        for one, two in zip(mine, theirs, strict=True)
    )


def selects_as(top_k: TopK, spec: RouterSpec = BIASED, **given: Any) -> bool:
    """True if the module selects like the function, which reads the same tensors anew."""
    logits = there(random_logits(spec, 9))
    return is_same(top_k(logits), moegate.select(logits, spec, **all_there(given or given_to(spec))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_the_selection(name: str, dtype: torch.dtype) -> None:
    """As the function's, which is held against the contract; also in tensors that are given, and with padding."""
    spec = SPECS[name]
    top_k, given = a_top_k(spec), all_there(given_to(spec))
    for rows in ROWS:
        logits = there(random_logits(spec, rows, dtype))
        more: dict[str, Any] = {"input_ids": there(token_ids(rows))} if spec.hash_routing else {}
        expected = moegate.select(logits, spec, **given, **more)
        assert is_same(top_k(logits, **more), expected)
        out = Routing(*(None if part is None else torch.empty_like(part) for part in expected))  # type: ignore[arg-type]
        filled = top_k(logits, out=out, **more)
        assert filled.topk_ids is out.topk_ids
        assert is_same(filled, expected)
        padding = there(torch.arange(rows) % 3 == 0)
        assert is_same(
            top_k(logits, padding=padding, **more), moegate.select(logits, spec, **given, padding=padding, **more)
        )


def test_changed_tensors_take_effect() -> None:
    bias = given_to(BIASED)["e_score_correction_bias"]
    top_k = a_top_k()
    assert selects_as(top_k)
    assert top_k.e_score_correction_bias is not None
    top_k.e_score_correction_bias.neg_()
    assert selects_as(top_k, e_score_correction_bias=-bias)
    assert not selects_as(top_k)
    top_k.e_score_correction_bias = there(2 * bias)
    assert selects_as(top_k, e_score_correction_bias=2 * bias)
    top_k.load_state_dict({"e_score_correction_bias": bias})
    assert selects_as(top_k)
    top_k.e_score_correction_bias = there(bias.bfloat16())
    assert selects_as(top_k, e_score_correction_bias=bias.bfloat16().float())
    top_k.e_score_correction_bias = there(bias[:-1])
    with pytest.raises(ValueError, match="e_score_correction_bias: got shape"):
        top_k(there(random_logits(BIASED, 3)))
    top_k.e_score_correction_bias = None
    with pytest.raises(ValueError, match="e_score_correction_bias: got None"):
        top_k(there(random_logits(BIASED, 3)))


def test_the_correction_bias_stays_in_float32() -> None:
    top_k = a_top_k().bfloat16()
    assert selects_as(top_k)
    assert selects_as(pickle.loads(pickle.dumps(top_k)))


def test_the_given_bias_is_read_not_a_copy() -> None:
    bias = there(given_to(BIASED)["e_score_correction_bias"].clone())
    top_k = TopK(BIASED, e_score_correction_bias=torch.nn.Parameter(bias))
    assert list(top_k.state_dict()) == ["e_score_correction_bias"]
    bias.neg_()
    assert selects_as(top_k, e_score_correction_bias=bias.cpu())


@pytest.mark.parametrize("name", ["sigmoid with bias in groups", "hash"])
def test_compiled_in_one_graph_for_any_number_of_tokens(name: str) -> None:
    spec = SPECS[name]
    top_k = a_top_k(spec)
    compiled = torch.compile(top_k, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 70, 1, 0, 9):
        logits = there(random_logits(spec, rows))
        more: dict[str, Any] = {"input_ids": there(token_ids(rows))} if spec.hash_routing else {}
        assert is_same(compiled(logits, **more), top_k(logits, **more))


def test_compiled_like_eager_with_a_bias_in_half_precision_and_tensors_to_fill() -> None:
    top_k, logits = a_top_k(), there(random_logits(BIASED, 9))
    top_k.e_score_correction_bias = there(given_to(BIASED)["e_score_correction_bias"].bfloat16())
    expected = top_k(logits)
    compiled = torch.compile(top_k, fullgraph=True, backend="aot_eager")
    out = Routing(*(None if part is None else torch.empty_like(part) for part in expected))  # type: ignore[arg-type]
    assert is_same(compiled(logits, out=out), expected)
    assert is_same(out, expected)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="check_out"):  # a compiler cannot write the error's words
        compiled(logits[:3], out=out)


def test_no_gradient_is_told() -> None:
    with pytest.warns(RuntimeWarning, match="no gradient flows"):
        routing = a_top_k()(there(random_logits(BIASED, 3)).requires_grad_())
    assert not routing.topk_weights.requires_grad


def test_wrappers() -> None:
    spec = SPECS["softmax"]
    top_k, logits = a_top_k(spec), there(random_logits(spec, 15).view(3, 5, -1))
    ids = torch.vmap(lambda part: top_k(part).topk_ids)(logits)
    assert ids.equal(torch.stack([top_k(part).topk_ids for part in logits]))
    assert back(top_k(logits[0])).topk_ids.equal(ids[0].cpu())


def test_the_plan_is_explained() -> None:
    top_k = a_top_k()
    with pytest.raises(RuntimeError, match="nothing was selected yet"):
        top_k.explain(3)
    top_k.warmup(torch.float32, device=there(torch.zeros(1)).device, padding=torch.bool)
    explained = top_k.explain(3)
    kernels = [explained.kernel, *(each.kernel for each in explained.rejected)]
    assert len(set(kernels)) == len(kernels)
    assert not any("+" in kernel or "gemm" in kernel for kernel in kernels), "no GEMM runs"
    assert {explained.expected_us, *(each.expected_us for each in explained.rejected)} == {None}
    assert "top_k=" in repr(top_k)


def test_what_is_refused() -> None:
    bias = given_to(BIASED)["e_score_correction_bias"]
    for options, error, words in (
        ({}, ValueError, "e_score_correction_bias: got None"),
        ({"e_score_correction_bias": 3}, TypeError, "e_score_correction_bias: got int"),
        ({"e_score_correction_bias": bias[1:]}, ValueError, r"e_score_correction_bias: got shape \["),
        ({"e_score_correction_bias": bias, "global_scale": bias[:1]}, ValueError, "global_scale: got a tensor"),
        ({"e_score_correction_bias": bias, "policy": "fast"}, ValueError, "policy: got 'fast'"),
        ({"e_score_correction_bias": bias, "backend": "cudnn"}, ValueError, "backend: got 'cudnn'"),
    ):
        with pytest.raises(error, match=words):
            TopK(BIASED, **all_there(options))
    with pytest.raises(TypeError, match="logits: got dtype float16"):
        a_top_k()(there(random_logits(BIASED, 3, torch.float16)))
    with pytest.raises(ValueError, match="input_ids: got a tensor"):
        a_top_k()(there(random_logits(BIASED, 3)), input_ids=there(token_ids(3)))
