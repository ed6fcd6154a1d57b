"""A program that runs a checkpoint in vLLM on a CPU, and writes what came out.

    python vllm_program.py CHECKPOINT RESULT [compile]

In RESULT, a file of torch.save: tokens, by what was done before; of the run with moegate, what each layer was given and
gave. The environment decides whether moegate is on, as it does for a user.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
from vllm import LLM, SamplingParams

PROMPTS = [list(range(5 + start, 25 + start)) for start in range(3)]


def tokens_of(llm: Any) -> list[list[int]]:
    """The greedy continuations of the prompts."""
    params = SamplingParams(max_tokens=10, min_tokens=10, ignore_eos=True, temperature=0, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params, use_tqdm=False)]


def record(layers: dict[str, Any]) -> list[dict[str, Any]]:
    """Has each call of a router noted, beside what vLLM's own router makes of the same logits."""
    calls: list[dict[str, Any]] = []
    for name, layer in layers.items():
        layer.router._compute_routing = recorded(name, layer.router, calls)
    return calls


def recorded(name: str, router: Any, calls: list[dict[str, Any]]) -> Any:
    """The router's method, which notes its calls."""
    plain_compute = router._compute_routing

    def compute(hidden: Any, logits: Any, ids_dtype: Any, *, input_ids: Any = None) -> Any:
        weights, ids = plain_compute(hidden, logits, ids_dtype, input_ids=input_ids)
        kind, logits = type(logits).__name__, logits.as_subclass(torch.Tensor)
        engine = type(router)._compute_routing(router, hidden, logits, ids_dtype, input_ids=input_ids)
        tensors = {"hidden": hidden, "logits": logits, "ids": ids, "weights": weights}
        tensors |= {"engine_weights": engine[0], "engine_ids": engine[1]}
        calls.append({"layer": name, "kind": kind} | {key: value.clone() for key, value in tensors.items()})
        return weights, ids

    return compute


def main(checkpoint: str, result: str, compile_: bool) -> None:
    """Runs the checkpoint."""
    import moegate.choice.dispatch as dispatch

    gemms = []
    plain_gemm = dispatch.Dispatch.router_gemm
    dispatch.Dispatch.router_gemm = lambda *args: gemms.append(1) or plain_gemm(*args)  # type: ignore[method-assign, func-returns-value]
    llm = LLM(
        model=checkpoint,
        skip_tokenizer_init=True,
        max_model_len=256,
        block_size=32,
        enforce_eager=not compile_,
        dtype="bfloat16",
        seed=0,
        max_num_seqs=4,
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    model = worker.model_runner.model
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "_forward_impl")}
    found: dict[str, Any] = {"tokens": tokens_of(llm), "gemms": len(gemms)}
    if not compile_:
        found["classes"] = {name: type(layer).__name__ for name, layer in layers.items()}
        found["gates"] = {name: layer.gate.weight.detach().clone() for name, layer in layers.items()}
        biases = {name: layer.router.e_score_correction_bias for name, layer in layers.items()}
        found["biases"] = {name: None if bias is None else bias.data.clone() for name, bias in biases.items()}
        for layer in layers.values():
            layer.gate.weight.data.neg_()  # a write that no version counts; vLLM has packed the weight, and keeps it
        found["tokens of negated gates"] = tokens_of(llm)
        if "deepseek" not in checkpoint:  # vLLM 0.32 cannot reload its latent attention on a CPU
            llm.collective_rpc("reload_weights")
            found["tokens after a reload"] = tokens_of(llm)
        calls = record(layers)
        found["tokens while recording"] = tokens_of(llm)
        found["calls"] = calls
    torch.save(found, result)
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads keep the process from ending


if __name__ == "__main__":
    main(str(Path(sys.argv[1])), sys.argv[2], "compile" in sys.argv[3:])
