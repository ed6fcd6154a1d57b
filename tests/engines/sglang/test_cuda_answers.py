"""moegate beside SGLang's way for CUDA: the branches of `select_experts`, its Triton router, its post-processing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sglang_cases
import torch
from sglang_cases import TOKENS, asked, case_of
from sglang_layers import EXPERTS, TOP_K, backend_of, hidden_of, logits_of

Answers = dict[tuple[str, bool], tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    file = tmp_path_factory.mktemp("cuda") / "answers.pt"
    # Read when SGLang's kernels are defined, and so in a process of its own from the start.
    subprocess.run(
        [sys.executable, sglang_cases.__file__, str(file)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(sglang_cases.__file__).parent)},
        check=True,
    )
    found: Any = torch.load(file)
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "has_shared"), asked())
def test_answer(name: str, has_shared: bool, answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.srt.layers.moe import topk

    monkeypatch.setattr(topk, "_is_cuda", True)
    top_k, padding = case_of(name, has_shared=has_shared), torch.tensor(TOKENS - 2, dtype=torch.int32)
    backend, ours = backend_of(top_k, hidden_of(TOKENS), logits_of(TOKENS), num_token_non_padded=padding)
    assert backend == "plugin"
    ids, weights = answers[name, has_shared]
    assert ids.shape == (TOKENS, TOP_K + has_shared)
    assert (ids[-2:, :TOP_K] == -1).all()  # and the column of a shared expert stays
    if has_shared:
        assert (ids[:, -1] == EXPERTS).all()
    if name in ("deepseek-v2", "sigmoid by groups"):  # PyTorch's operations, whose topk is not sorted
        (ids, order), routed = ids.sort(), ours.topk_ids.sort()
        weights, ours_by_id = weights.gather(-1, order), ours.topk_weights.gather(-1, routed.indices)
        assert routed.values.equal(ids)
    else:
        ours_by_id = ours.topk_weights
        assert ours.topk_ids.equal(ids)
    # Of padding, SGLang's router for sqrtsoftplus sets the weights to 0; with an id of -1 nobody reads them.
    torch.testing.assert_close(ours_by_id[:-2], weights[:-2], rtol=1e-5, atol=1e-7)
