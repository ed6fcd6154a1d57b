"""Configs whose layers differ: by lists, tables, hash layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from small_configs import HUNYUAN, QWEN, QWEN_SPEC, V4
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from moegate import RouterSpec


def test_hash_layers() -> None:
    hashed = [RouterSpec.from_config({**V4, "num_hash_layers": 2}, layer=layer).hash_routing for layer in range(5)]
    assert hashed == [True, True, False, False, False]
    by_default = [RouterSpec.from_config(V4, layer=layer).hash_routing for layer in range(5)]
    assert by_default == [True, True, True, False, False]
    saved = CONFIG_MAPPING["deepseek_v4"](num_hidden_layers=8, num_hash_layers=2).to_dict()
    assert [RouterSpec.from_config(saved, layer=layer).hash_routing for layer in range(8)] == [True] * 2 + [False] * 6

    first, last = (RouterSpec.from_config(V4, layer=layer) for layer in (0, 3))
    assert first == replace(last, hash_routing=True, correction_bias=None)
    assert RouterSpec.from_config(V4) == last == RouterSpec.from_config(saved)  # the rule that most layers follow
    with pytest.raises(ValueError, match="layer = 8; allowed: 0 to 7"):
        RouterSpec.from_config(saved, layer=8)


def test_lists_by_layer() -> None:
    same = {**HUNYUAN, "moe_topk": [4, 4, 4]}
    assert RouterSpec.from_config(same) == RouterSpec.from_config({**HUNYUAN, "moe_topk": 4})
    differing = {**HUNYUAN, "num_experts": [16, 32], "moe_topk": [4, 2]}
    first, second = (RouterSpec.from_config(differing, layer=layer) for layer in (0, 1))
    assert (first.num_experts, first.top_k, second.num_experts, second.top_k) == (16, 4, 32, 2)
    with pytest.raises(ValueError, match=r"num_experts differs between layers \(\[16, 32\]\); name the layer"):
        RouterSpec.from_config(differing)
    for layer, allowed in ((2, "0 to 1"), (-1, "0 or more")):
        with pytest.raises(ValueError, match=f"layer = {layer}; allowed: {allowed}"):
            RouterSpec.from_config(differing, layer=layer)
    with pytest.raises(ValueError, match="moe_topk is an empty list"):
        RouterSpec.from_config({**HUNYUAN, "moe_topk": []})


def test_a_pair_is_no_list_of_layers() -> None:
    """ERNIE-4.5-VL states two numbers of experts, for text and for images."""
    for moe_num_experts in ([64, 32], 64):
        config = {"model_type": "ernie4_5_moe_vl", "hidden_size": 2560, "moe_num_experts": moe_num_experts, "moe_k": 6}
        for layer in (None, 1, 5):
            assert RouterSpec.from_config(config, layer=layer).num_experts == 64


def test_layers_by_a_table_or_a_list_of_theirs() -> None:
    """Keys may be ints, as in Transformers, or texts, as in files; entries hold for their own layers alone."""
    own = {"num_experts_per_tok": 1}
    for layers in ({3: own}, {"3": own}, [{}, {}, {}, own]):
        config = {**QWEN, "per_layer_config": layers}
        assert [RouterSpec.from_config(config, layer=layer).top_k for layer in (0, 3)] == [4, 1]
    every = {**QWEN, "num_hidden_layers": 2, "per_layer_config": {"0": own, "1": own}}
    assert RouterSpec.from_config(every).top_k == 1
    with pytest.raises(ValueError, match="num_experts_per_tok differs between layers"):
        RouterSpec.from_config({**every, "per_layer_config": {"0": own, "1": {}}})
    for wrong in (3, "0", {"0": 3}, [None]):
        with pytest.raises(ValueError, match=r"per_layer_config = .*allowed: a dict of dicts"):
            RouterSpec.from_config({**QWEN, "per_layer_config": wrong})
    blocks = {**QWEN, "block_configs": [own, {}, None]}
    assert [RouterSpec.from_config(blocks, layer=layer).top_k for layer in (0, 1, 2)] == [1, 4, 4]
    with pytest.raises(ValueError, match="num_experts_per_tok differs between layers"):
        RouterSpec.from_config(blocks)


def test_config_of_one_layer() -> None:
    config = {**QWEN, "per_layer_config": {"1": {"num_experts": 8, "num_experts_per_tok": 2}}}
    assert RouterSpec.from_config(config) == RouterSpec.from_config(config, layer=0) == QWEN_SPEC
    assert RouterSpec.from_config(config, layer=1) == replace(QWEN_SPEC, num_experts=8, top_k=2)


@pytest.mark.parametrize("layer", ["3", 3.0, True])
def test_a_layer_that_is_none(layer: Any) -> None:
    with pytest.raises(TypeError, match=r"layer: got .*; allowed: an int"):
        RouterSpec.from_config(QWEN, layer=layer)
