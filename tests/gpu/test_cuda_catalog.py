"""Every router of the catalog at its real size on a GPU, compared with float64."""

from __future__ import annotations

from functools import cache

import pytest
from torch import Tensor

from moegate import Gate, RouterSpec
from moegate.catalog import models
from moegate.contract import reference
from moegate.contract.verify import verify_logits, verify_routing
from moegate.routing import RouterTensors
from moegate.synthetic import random_hidden, random_input_ids, random_tensors

# One name for each different router.
DISTINCT = {spec: name for name, spec in reversed([(model.name, model.spec) for model in models()])}
NAMES = {name: spec for spec, name in DISTINCT.items()}
ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 257, 4096)
FLIP_ROWS = 257


@cache
def hidden_of_size(hidden_size: int) -> Tensor:
    """Hidden states, shared by all specs of a size, since drawing takes longer than routing."""
    return random_hidden(RouterSpec(hidden_size, 1, 1), ROWS[-1], device="cuda")


def flips(ids: Tensor, hidden: Tensor, weight: Tensor, spec: RouterSpec, tensors: RouterTensors) -> int:
    """The number of rows with other experts than by the exact logits, because of float32 sums."""
    tensors = RouterTensors(*(None if part is None else part.cpu() for part in tensors))
    exact = reference.router_logits(hidden.cpu(), weight.cpu(), spec, tensors)
    expected = reference.select(exact, spec, tensors, None).topk_ids
    return int(ids.cpu().sort(-1).values.ne(expected.sort(-1).values).any(-1).sum())


@pytest.mark.parametrize("name", NAMES)
def test_routers_of_the_catalog_keep_the_contract(name: str) -> None:
    spec = NAMES[name]
    weight, tensors = random_tensors(spec, device="cuda")
    gate = Gate(spec, weight, **tensors._asdict(), frozen=True)
    assert gate._notice()[0].dispatch.name == "cuda"
    hidden = hidden_of_size(spec.hidden_size)
    input_ids = random_input_ids(len(hidden), device="cuda") if spec.hash_routing else None
    excused, share = 0, 0.0
    for rows in ROWS:
        part, ids = hidden[:rows], None if input_ids is None else input_ids[:rows]
        routing = gate(part, input_ids=ids, return_logits=True)
        of_logits = verify_logits(routing.logits, part, weight, spec, tensors)
        of_routing = verify_routing(routing, routing.logits, spec, tensors, input_ids=ids)
        assert of_logits.problems == [], f"at M = {rows}"
        assert of_routing.problems == [], f"at M = {rows}"
        excused += of_routing.excused_rows
        share = max(share, of_logits.share_of_bound)
        if rows == FLIP_ROWS and not spec.hash_routing:
            print(f"{name}: {flips(routing.topk_ids, part, weight, spec, tensors)} of {rows} rows flip")
    print(f"{name}: {excused} of {sum(ROWS)} rows excused; logit errors up to {share:.2f} of the bound")
