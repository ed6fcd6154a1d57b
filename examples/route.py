"""DeepSeek-V3's router on random tensors, and why which kernels ran: `python route.py`."""

import torch

import moegate

spec = moegate.get_spec("deepseek-v3")  # or moegate.RouterSpec.from_config("path/to/config.json")
device = "cuda" if torch.cuda.is_available() else "cpu"
weight = torch.randn(spec.num_experts, spec.hidden_size, dtype=torch.bfloat16, device=device) * 0.01
bias = torch.zeros(spec.num_experts, device=device)

gate = moegate.Gate(spec, weight, e_score_correction_bias=bias, frozen=True)
hidden = torch.randn(4, spec.hidden_size, dtype=torch.bfloat16, device=device)
routing = gate(hidden)

print(routing.topk_ids)  # int32 [4, 8], best first, equal keys by lowest id
print(routing.topk_weights.sum(dim=-1))  # 2.5 each: renormalised, then scaled
print(gate.explain(num_tokens=4))
