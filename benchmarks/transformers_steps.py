"""Decode steps of Transformers with its own routers and with moegate's, on one GPU, in one process.

`python benchmarks/transformers_steps.py [PART...]` prints a Markdown table for each part; all parts, if none is named:

- `qwen3`: Qwen3-30B-A3B whole, a step in a CUDA graph.
- `deepseek-v3`: DeepSeek-V3 with four MoE layers, a step in a CUDA graph.
- `deepseek-v3-tp8`: the same with an eighth of each expert, as a rank of tensor parallel 8 has it.
- `generate`: Qwen3-30B-A3B with eight layers, `generate` with a compiled static cache.

Weights are random. The two graphs take turns, and a time is the median over the turns. After the turns, the routing of
every layer of the timed graph is held against the contract, on the hidden states that the layer had.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3MoeConfig, StaticCache

from moegate.contract import bounds, reference
from moegate.contract.verify import verify_routing
from moegate.integrations.transformers import patch, unpatch
from moegate.integrations.transformers.classes import STATE
from moegate.measure.record import describe_run
from moegate.routing import RouterTensors, Routing

BATCHES, POSITION, CACHE = (1, 4, 16, 64), 256, 320
TURNS, REPLAYS = 9, 20
NEW_TOKENS = 64
QWEN3: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}


def random_model(config: Any) -> Any:
    """A model on the GPU, in bfloat16, with random weights; scaled so that the logits of routers are of order 1."""
    torch.manual_seed(0)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cuda")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("inv_freq"):
            continue
        if tensor.dim() > 1:
            tensor.data.normal_(0, tensor.shape[-1] ** -0.5)
        else:
            tensor.data.fill_(1.0 if "norm" in name else 0.0)
    for module in model.modules():  # to_empty lost what the constructor computed
        if hasattr(module, "inv_freq"):
            fresh = type(module)(config)
            module.inv_freq.copy_(fresh.inv_freq)
            module.original_inv_freq.copy_(fresh.original_inv_freq)
    return model.eval().requires_grad_(False)


@contextmanager
def kept_calls(model: nn.Module, calls: list[tuple[nn.Module, Tensor, Any]]) -> Iterator[None]:
    """Keeps what each of moegate's routers is given and returns."""

    def keep(module: nn.Module, given: tuple[Tensor, ...], output: Any) -> None:
        calls.append((module, given[0], output))

    handles = [module.register_forward_hook(keep) for module in model.modules() if STATE in vars(module)]
    yield
    for handle in handles:
        handle.remove()


class Step:
    """A decode step of `batch` tokens at one position, as a CUDA graph."""

    def __init__(self, model: Any, batch: int) -> None:
        self.cache = StaticCache(config=model.config, max_cache_len=CACHE)
        self.graph = torch.cuda.CUDAGraph()
        self.calls: list[tuple[nn.Module, Tensor, Any]] = []
        ids = torch.arange(batch, device="cuda").view(batch, 1) + 7
        positions = torch.full((batch, 1), POSITION, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(ids, position_ids=positions, cache=self.cache, use_cache=True)
        torch.cuda.current_stream().wait_stream(stream)
        self.rewind()
        with kept_calls(model, self.calls), torch.cuda.graph(self.graph):
            model(ids, position_ids=positions, cache=self.cache, use_cache=True)

    def rewind(self) -> None:
        """Back to the position from which each replay takes one step."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(POSITION)

    def microseconds(self) -> float:
        """The mean of some replays."""
        self.rewind()
        self.graph.replay()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(REPLAYS):
            self.graph.replay()
        end.record()
        end.synchronize()
        elapsed: float = start.elapsed_time(end)
        return elapsed * 1e3 / REPLAYS


def verify(calls: list[tuple[nn.Module, Tensor, Any]]) -> int:
    """Holds every routing of a graph against the contract; returns how many rows there were."""
    rows = 0
    for router, given, (logits, weights, ids) in calls:
        taken = vars(router)[STATE]
        hidden, weight = given.reshape(-1, given.shape[-1]), router.get_parameter("weight")
        spec = taken.spec_for(weight.dtype, hidden.dtype)
        tensors = RouterTensors(e_score_correction_bias=getattr(router, "e_score_correction_bias", None))
        cpu = RouterTensors(*(None if tensor is None else tensor.cpu() for tensor in tensors))
        exact = reference.router_logits(hidden.cpu(), weight.cpu(), replace(spec, logits_dtype="float32"), cpu)
        error = bounds.logit_bound(hidden.cpu(), weight.cpu(), exact, spec, cpu)
        assert ((logits.cpu().double() - exact).abs() <= error).all()
        verdict = verify_routing(Routing(ids, weights), exact, spec, cpu, logit_error=error)
        assert not verdict.problems, verdict.problems
        rows += verdict.rows
    return rows


@contextmanager
def free_routers(outputs: dict[nn.Module, Callable[[int], Any]]) -> Iterator[None]:
    """Routers that compute nothing: what they return for M tokens. No router could make a step faster."""
    for router, output in outputs.items():
        router.forward = lambda hidden, output=output: output(hidden.numel() // hidden.shape[-1])
    yield
    for router in outputs:
        del router.forward


def same(output: Any, num_tokens: int) -> Any:
    """What another router returned."""
    return output


def steps(config: Any) -> None:
    """A table of decode steps."""
    model = random_model(config)
    print("| batch | own routers, us | moegate, us | times as fast | free routers, us | routings checked |")
    print("|---|---|---|---|---|---|")
    for batch in BATCHES:
        own = Step(model, batch)
        takeover = patch(model)
        assert not takeover.left, takeover.left
        ours = Step(model, batch)
        with free_routers({router: partial(same, output) for router, _, output in ours.calls}):
            free = Step(model, batch)
        times = [(own.microseconds(), ours.microseconds(), free.microseconds()) for _ in range(TURNS)]
        theirs, mine, least = (statistics.median(found) for found in zip(*times, strict=True))
        rows = verify(ours.calls)
        unpatch(model)
        print(f"| {batch} | {theirs:.0f} | {mine:.0f} | {theirs / mine:.3f} | {least:.0f} | {rows} |", flush=True)
        del own, ours, free
        torch.cuda.empty_cache()


def qwen3() -> None:
    """Qwen3-30B-A3B, whole."""
    steps(Qwen3MoeConfig(**QWEN3))


def deepseek_v3(parts: int = 1) -> None:
    """DeepSeek-V3 with four layers, all of them with experts, of which a GPU has one of `parts` parts."""
    steps(DeepseekV3Config(num_hidden_layers=4, first_k_dense_replace=0, moe_intermediate_size=2048 // parts))


def generate() -> None:
    """`generate` with eight layers and a compiled static cache."""
    model = random_model(Qwen3MoeConfig(**{**QWEN3, "num_hidden_layers": 8}))
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    routers = [module for module in model.modules() if type(module).__name__ == "Qwen3MoeTopKRouter"]
    ids = torch.rand(1024, 128, device="cuda").topk(8).indices
    logits = torch.zeros(1024, 128, device="cuda", dtype=torch.bfloat16)
    fixed = logits, torch.full_like(ids, 1 / 8, dtype=torch.bfloat16), ids

    def first_rows(num_tokens: int) -> Any:
        return tuple(part[:num_tokens] for part in fixed)

    def milliseconds() -> float:
        torch.compiler.reset()
        found = []
        for _ in range(7):
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(prompt, cache_implementation="static", **options)
            torch.cuda.synchronize()
            found.append((time.perf_counter() - start) * 1e3 / NEW_TOKENS)
        return statistics.median(found[2:])  # the first two compile

    print("| batch | own routers, ms a token | moegate, ms a token | times as fast | free routers, ms a token |")
    print("|---|---|---|---|---|")
    for batch in (1, 16):
        prompt = torch.arange(batch * 32, device="cuda").view(batch, 32) % 1000
        theirs = milliseconds()
        patch(model)
        mine = milliseconds()
        unpatch(model)
        with free_routers(dict.fromkeys(routers, first_rows)):
            least = milliseconds()
        print(f"| {batch} | {theirs:.3f} | {mine:.3f} | {theirs / mine:.3f} | {least:.3f} |", flush=True)


PARTS: dict[str, Callable[[], None]] = {
    "qwen3": qwen3,
    "deepseek-v3": deepseek_v3,
    "deepseek-v3-tp8": lambda: deepseek_v3(8),
    "generate": generate,
}

if __name__ == "__main__":
    run = describe_run(" ".join(sys.argv))
    print(", ".join(f"{name} {value}" for name, value in run.items()), flush=True)
    with torch.no_grad():
        for part in sys.argv[1:] or PARTS:
            print(f"\n{part}\n", flush=True)
            PARTS[part]()
            torch.cuda.empty_cache()
