"""A Transformers model generates with moegate's routers: `python transformers_generate.py FOLDER`."""

import sys

import torch
from transformers import AutoModelForCausalLM

from moegate.integrations.transformers import patch, unpatch

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
prompt = torch.tensor([[11, 42, 7, 99, 3]])

print(patch(model))  # moegate routes 3 of 3 MoE layers
print("with moegate:   ", model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist())

unpatch(model)
print("without moegate:", model.generate(prompt, max_new_tokens=8, do_sample=False)[0].tolist())
