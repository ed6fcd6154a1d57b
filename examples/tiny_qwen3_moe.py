"""Writes a tiny Qwen3-MoE checkpoint with random weights, for trying an engine: `python tiny_qwen3_moe.py FOLDER`."""

import sys

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

config = Qwen3MoeConfig(
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    num_experts=32,
    num_experts_per_tok=4,
    norm_topk_prob=True,
    vocab_size=512,
    max_position_embeddings=512,
    dtype="bfloat16",
)
torch.manual_seed(0)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
for parameter in model.parameters():
    if parameter.dim() > 1:
        parameter.data.normal_(0, 0.08)
model.save_pretrained(sys.argv[1])
print(f"wrote {sys.argv[1]}")
