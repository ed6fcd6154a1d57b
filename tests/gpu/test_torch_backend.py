"""The torch backend on a CUDA device, without the fast paths of the CPU."""

from __future__ import annotations

import pytest
import torch
from routers import SPECS, generator, route_arguments, tensors_of

from moegate.choice.dispatch import Options, for_route
from moegate.contract.verify import verify_call
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
            tensors_there = RouterTensors(**arguments)
            dispatch = for_route(hidden.device, spec, weight_there, tensors_there, Options(backend="torch"))
            routing = dispatch.route(hidden, weight_there, tensors_there, ids, {})
            assert verify_call(routing, hidden, weight_there, spec, tensors, ids).problems == []
