"""A gate inside a model that Transformers loads: built on meta, its tensors assigned one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from noticing_gates import HIDDEN, IDS, a_gate, routed_as
from on_device import DEVICE
from routers import SPECS
from torch import Tensor

from moegate import Gate, RouterSpec, Routing

transformers = pytest.importorskip("transformers")


class Config(transformers.PretrainedConfig):  # type: ignore[misc, name-defined]
    model_type = "moegate-test"

    def __init__(self, router: str = "hash", frozen: bool = False, **given: Any) -> None:
        super().__init__(**given)
        self.router, self.frozen = router, frozen


class Model(transformers.PreTrainedModel):  # type: ignore[misc, name-defined]
    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        spec: RouterSpec = SPECS[config.router]
        empty: dict[str, Any] = {name: torch.empty_like(part) for name, part in a_gate(spec).state_dict().items()}
        self.gate = Gate(spec, **empty, frozen=config.frozen)
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        pass

    def forward(self, hidden: Tensor, **given: Tensor) -> Routing:
        routing: Routing = self.gate(hidden, **given)
        return routing


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("router", ["sigmoid with bias in groups", "softmax with bias and floor", "hash"])
@pytest.mark.parametrize("dtype", ["auto", torch.bfloat16], ids=str)
def test_from_pretrained(router: str, frozen: bool, dtype: Any, tmp_path: Path) -> None:
    spec = SPECS[router]
    ids = {"input_ids": IDS} if spec.hash_routing else {}
    whole = a_gate(spec)
    model = Model(Config(router, frozen)).to(DEVICE)
    model.gate.load_state_dict(whole.state_dict())
    expected = model(HIDDEN, **ids)
    assert expected.topk_ids.equal(whole(HIDDEN, **ids).topk_ids)
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=dtype).to(DEVICE)
    assert loaded.gate.weight.dtype == whole.weight.dtype
    assert loaded(HIDDEN, **ids).topk_ids.equal(expected.topk_ids)
    assert routed_as(loaded.gate, **ids)
    assert bool(loaded.gate._notice()[0].prepared) == frozen or DEVICE.type == "cuda"
