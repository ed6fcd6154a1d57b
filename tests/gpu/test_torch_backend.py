"""The torch backend on a CUDA device, without the shortcuts that only a CPU can take."""

from __future__ import annotations

import pytest
import torch
from routers import SPECS, generator, route_arguments, tensors_of

from moegate.backends.torch import TorchBackend
from moegate.contract.verify import verify_logits, verify_routing
from moegate.routing import RouterTensors


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_keeps_the_contract(name: str) -> None:
    spec = SPECS[name]
    tensors = tensors_of(spec)
    weight = torch.randn(spec.num_gate_rows, 64, generator=generator(3)) / 8
    for dtype in (torch.float32,) if spec.weight_dtype == "float32" else (torch.float32, torch.bfloat16, torch.float16):
        for rows in (0, 1, 17, 300):
            arguments = {name: part.cuda() for name, part in route_arguments(spec, tensors, rows).items()}
            ids = arguments.pop("input_ids", None)
            hidden = torch.randn(rows, 64, generator=generator(4)).to("cuda", dtype)
            weight_there = weight.to("cuda", dtype)
            routing = TorchBackend().route(hidden, weight_there, spec, RouterTensors(**arguments), ids, None)
            assert routing.logits is not None
            assert verify_logits(routing.logits, hidden, weight_there, spec, tensors).problems == []
            assert verify_routing(routing, routing.logits, spec, tensors, input_ids=ids).problems == []
