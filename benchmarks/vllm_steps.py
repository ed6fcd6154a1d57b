"""Decode steps of vLLM with its own routers and with moegate's plugin, on one GPU, in one process.

`python benchmarks/vllm_steps.py qwen3` and `... deepseek-v3` print a Markdown table for one model: eight layers of real
sizes (DeepSeek-V3's with an eighth of the heads and of each expert, as a rank of tensor parallel 8 has them), random
weights, compiled and in CUDA graphs. vLLM's own loader of plugins loads moegate.

The experts get the same balanced ids and weights in every way, whatever the routers choose, so that the ways differ in
the routers alone. The full graph of a decode step is replayed between two events; a time is the median over turns.
After the turns, the routing of every layer of the timed graph is held against the contract.
"""

from __future__ import annotations

import collections
import json
import os
import random
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {
    "MOEGATE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

import torch
import vllm
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.compilation.cuda_graph import CUDAGraphWrapper
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from moegate.contract import bounds, reference
from moegate.contract.verify import verify_routing
from moegate.measure.record import describe_run
from moegate.routing import RouterTensors, Routing

BATCHES = [1, 8, 32, 64]
REPLAYS, TURNS, TOKENS = 100, 7, 16384
COMMON: dict[str, Any] = {
    "num_hidden_layers": 8,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": COMMON
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "rope_theta": 1e6,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "deepseek-v3": COMMON
    | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "intermediate_size": 2048,
        "moe_intermediate_size": 256,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_theta": 10000.0,
    },
}


class Bench:
    """A model in vLLM, whose routers can be exchanged."""

    def __init__(self, name: str) -> None:
        config = MODELS[name]
        folder = Path(tempfile.mkdtemp())
        (folder / "config.json").write_text(json.dumps(config))
        self.llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_seqs=64,
            max_num_batched_tokens=8192,
            gpu_memory_utilization=0.8,
            enable_prefix_caching=False,
            dtype="bfloat16",
            seed=0,
            compilation_config={"cudagraph_capture_sizes": BATCHES},
        )
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        self.model_runner: Any = getattr(worker, "worker", worker).model_runner
        runners = [module for module in self.model_runner.get_model().modules() if isinstance(module, MoERunner)]
        # What the plugin put in the place of a router's method belongs to the layer that it took over.
        self.layers: list[Any] = [runner.router._compute_routing.__self__ for runner in runners]
        assert len(self.layers) == COMMON["num_hidden_layers"]
        experts = config.get("num_experts") or config["n_routed_experts"]
        chosen = torch.rand(TOKENS, experts, device="cuda").topk(config["num_experts_per_tok"]).indices
        self.ids = chosen.to(torch.int32).contiguous()
        self.weights = torch.full(self.ids.shape, 1 / self.ids.shape[1], device="cuda")
        self.logits = torch.zeros(TOKENS, experts, device="cuda", dtype=torch.bfloat16)
        self.padding = torch.zeros(TOKENS, dtype=torch.bool, device="cuda")
        self.calls: list[tuple[Any, Tensor, Tensor, Tensor]] = []
        self.replayed: list[torch.cuda.CUDAGraph] = []
        self.way = ""

    def capture(self, way: str) -> None:
        """Captures vLLM's graphs with the routers of a way."""
        self.calls.clear()
        self.way = way
        for layer in self.layers:
            gate, routing = {
                "own": (layer.engine_gate, layer.engine_routing),
                "own, as 0.33": (layer.engine_gate, layer.engine_routing),
                "no router": (self.no_gate, self.no_routing),
            }.get(way, (layer.forward, layer.compute_routing))
            layer.linear.forward, layer.runner.router._compute_routing = gate, self.fixed(layer, routing)
            layer.mask = self.mask if way == "moegate, padding" else None
            if hasattr(layer.linear, "allow_dsv3_router_gemm"):  # 0.33 has no such kernel any more
                layer.linear.allow_dsv3_router_gemm = way != "own, as 0.33"
        CUDAGraphWrapper.clear_all_graphs()
        torch.cuda.synchronize()
        self.model_runner.capture_model()

    def fixed(self, layer: Any, routing: Any) -> Any:
        """A router's method with another result."""

        def compute_routing(hidden_states: Tensor, router_logits: Tensor, *arguments: Any, **named: Any) -> Any:
            weights, ids = routing(hidden_states, router_logits, *arguments, **named)
            is_full = get_forward_context().cudagraph_runtime_mode == CUDAGraphMode.FULL
            if self.way.startswith("moegate") and is_full and torch.cuda.is_current_stream_capturing():
                self.calls.append((layer, hidden_states, weights, ids))
            return self.no_routing(hidden_states)

        return compute_routing

    def mask(self, num_tokens: int) -> Tensor:
        """No row is padding, as the kernels find out."""
        return self.padding[:num_tokens]

    def no_gate(self, x: Tensor) -> Any:
        """Logits that nobody computes."""
        return self.logits[: len(x)], None

    def no_routing(self, hidden_states: Tensor, *_: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """The balanced ids and their weights."""
        return self.weights[: len(hidden_states)], self.ids[: len(hidden_states)]

    def step(self, batch: int) -> tuple[float, int]:
        """Median microseconds of the full graph that decodes `batch` tokens, and how many routings in it were right."""
        self.replayed.clear()
        numbers = random.Random(0)
        prompts = [{"prompt_token_ids": [numbers.randrange(10, 31000) for _ in range(100)]} for _ in range(batch)]
        options = SamplingParams(max_tokens=12, min_tokens=12, ignore_eos=True, temperature=0.0, detokenize=False)
        self.llm.generate(prompts, options, use_tqdm=False)
        graph = collections.Counter(self.replayed).most_common(1)[0][0]
        for _, _, _, ids in self.calls:
            ids.fill_(-7)
        times = []
        for _ in range(TURNS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPLAYS):
                REPLAY(graph)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / REPLAYS)
        return statistics.median(times), self.verify(batch)

    def verify(self, batch: int) -> int:
        """Holds the routing of each layer of the replayed graph against the contract; returns the number of rows."""
        rows = 0
        for layer, hidden, weights, ids in self.calls:
            if len(ids) != batch:  # of another graph
                continue
            spec, bias = layer.gate.spec, layer.rule.correction_bias
            tensors = RouterTensors(e_score_correction_bias=None if bias is None else bias.cpu())
            hidden, weight = hidden.cpu(), layer.linear.weight.detach().cpu()
            exact = reference.router_logits(hidden, weight, replace(spec, logits_dtype="float32"), tensors)
            error = bounds.logit_bound(hidden, weight, exact, spec, tensors)
            verdict = verify_routing(Routing(ids, weights), exact, spec, tensors, logit_error=error)
            assert not verdict.problems, (verdict.problems, ids, weights)
            rows += verdict.rows
        return rows


REPLAY = torch.cuda.CUDAGraph.replay


def main(name: str) -> None:
    """Prints the table of a model."""
    run = describe_run(" ".join(sys.argv))
    print(", ".join(f"{key} {value}" for key, value in run.items()) + f", vllm {vllm.__version__}", flush=True)
    bench = Bench(name)

    def replay(graph: torch.cuda.CUDAGraph) -> None:
        bench.replayed.append(graph)
        REPLAY(graph)

    torch.cuda.CUDAGraph.replay = replay  # type: ignore[method-assign, assignment]
    ways = ["own", *(["own, as 0.33"] if name == "deepseek-v3" else []), "moegate", "moegate, padding", "no router"]
    found: dict[str, dict[int, tuple[float, int]]] = {}
    for way in (*ways, "own again", "moegate again"):
        bench.capture(way.removesuffix(" again"))
        found[way] = {batch: bench.step(batch) for batch in BATCHES}
        print(way, found[way], flush=True)
    columns = list(found)
    print(f"\n| batch | {' | '.join(columns)} | routings checked |\n|---{'|---' * len(columns)}|---|")
    for batch in BATCHES:
        times = " | ".join(f"{found[way][batch][0]:.1f}" for way in columns)
        print(f"| {batch} | {times} | {found['moegate'][batch][1]} |")
    sys.stdout.flush()
    os._exit(0)  # vLLM's threads keep the process


if __name__ == "__main__":
    with torch.inference_mode():
        main(sys.argv[1])
