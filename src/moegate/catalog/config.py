"""From a Hugging Face config.json to the fields of a RouterSpec, by the tables of types/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from moegate.catalog.lookup import at, has, of_layer, text_of
from moegate.catalog.model_types import ModelType
from moegate.catalog.parts import routing_config
from moegate.catalog.stated import warn_of_keys_not_followed

_NULL_MEANS_ONE = ("n_group", "topk_group", "routed_scaling_factor")
_ABSENT = object()


class Found(NamedTuple):
    """The value of one RouterSpec field."""

    value: Any
    """`_ABSENT`: the table says nothing, so that RouterSpec's own default holds."""
    by: str | None = None
    """The config key that decided; None: the table alone."""


def router_fields(config: object, *, layer: int | None = None) -> tuple[str, dict[str, Any]]:
    """The model type and the RouterSpec fields of a config; see `RouterSpec.from_config`."""
    if layer is not None and layer < 0:
        raise ValueError(f"layer = {layer}; allowed: 0 or more, or None")
    values, model_type = routing_config(config)
    values = {**values, **_of_blocks(values, layer)}
    if layer is not None:
        values = {**values, **_of_one_layer(values, layer)}
    _check_has_experts(values, model_type)
    found = {name: _field(name, values, model_type, layer) for name in model_type.fields}
    fields = {name: field.value for name, field in found.items() if field.value is not _ABSENT}
    if fields["num_experts"] in (0, 1, None):  # one expert takes every token: families write their dense members so
        raise _no_experts(model_type, f"{found['num_experts'].by} = {text_of(fields['num_experts'])}")
    _settle(fields, values, model_type)
    warn_of_keys_not_followed(values, model_type, fields, {name: field.by for name, field in found.items()})
    rule = model_type.hash_routing_layers
    if rule is not None and _is_hash_layer(values, rule, layer):
        fields.update(hash_routing=True, correction_bias=None)
    return model_type.name, fields


def _settle(fields: dict[str, Any], values: dict[str, Any], model_type: ModelType) -> None:
    """Replaces the values that are not copied as they stand."""
    if fields.get("logits_dtype") == "model":
        fields["logits_dtype"] = "bfloat16" if values.get("dtype", model_type.dtype) == "bfloat16" else "float32"
    if fields.get("logit_softcapping") == 0:
        fields["logit_softcapping"] = None
    if not fields.get("renormalize"):  # then there is no sum that a type's epsilon could be added to
        fields.pop("renormalize_eps", None)
        fields.pop("renormalize_floor", None)


def _check_has_experts(values: dict[str, Any], model_type: ModelType) -> None:
    """Refuses a dense member of a type that has others with experts."""
    for rule in model_type.dense:
        value = at(values, rule["key"])
        lacks = isinstance(value, (str, list, tuple)) and "without" in rule and rule["without"] not in value
        if lacks or (has(values, rule["key"]) and "is" in rule and value == rule["is"]):
            shown = f"{rule['key']} has no {rule['without']!r}" if lacks else f"{rule['key']} = {text_of(value)}"
            raise _no_experts(model_type, shown)


def _no_experts(model_type: ModelType, why: str) -> ValueError:
    return ValueError(f"config of model_type {model_type.name!r}: this model has no experts ({why})")


def _field(name: str, values: dict[str, Any], model_type: ModelType, layer: int | None) -> Found:
    """One spec field: from choices, keys, defaults, or what the type hard-wires."""
    choice = model_type.choices.get(name)
    if choice is not None:
        chosen = _choose(name, choice, values, model_type)
        if chosen != "from_keys":
            return Found(None if chosen == "none" else chosen, choice["key"] if has(values, choice["key"]) else None)
    keys = model_type.keys_of(name)
    for key in keys:
        value = at(values, key)
        if value is None and name in _NULL_MEANS_ONE and has(values, key):
            return Found(1, key)
        if value is not None:
            return Found(of_layer(key, value, layer, name), key)
    for table in (model_type.defaults, model_type.spec):
        if name in table:
            return Found(table[name])
    if keys:
        raise _missing(name, keys, model_type)
    return Found(_ABSENT)


def _missing(name: str, keys: list[str], model_type: ModelType) -> ValueError:
    why = f"and no default for {name}"
    if name == "num_experts":
        why = "which a config with experts states: this model has no experts, or its config is not whole"
    return ValueError(f"config of model_type {model_type.name!r}: no {' or '.join(keys)}, {why}")


def _choose(name: str, choice: dict[str, Any], values: dict[str, Any], model_type: ModelType) -> Any:
    key = choice["key"]
    if not has(values, key):
        return choice.get("absent", "from_keys")
    value = at(values, key)
    text = text_of(value)
    if text in choice:
        return choice[text]
    if "else" in choice:
        return choice["else"]
    allowed = ", ".join(option for option in choice if option not in ("key", "absent"))
    raise ValueError(f"config of model_type {model_type.name!r}: {key} = {value!r}; allowed for {name}: {allowed}")


def _of_one_layer(values: dict[str, Any], layer: int) -> dict[str, Any]:
    """What a config says of this layer alone."""
    layers = values.get("per_layer_config")
    own = layers.get(str(layer)) if isinstance(layers, Mapping) else None
    return dict(own) if isinstance(own, Mapping) else {}


def _of_blocks(values: dict[str, Any], layer: int | None) -> dict[str, Any]:
    """What `block_configs` says: of this layer, or of all layers as lists."""
    blocks = values.get("block_configs")
    if not isinstance(blocks, (list, tuple)) or not all(isinstance(block, Mapping) for block in blocks):
        return {}
    if layer is not None:
        return dict(of_layer("block_configs", blocks, layer, "its router"))
    keys = dict.fromkeys(key for block in blocks for key in block)
    return {key: [block[key] for block in blocks if key in block] for key in keys}


def _is_hash_layer(values: dict[str, Any], rule: dict[str, Any], layer: int | None) -> bool:
    kinds = values.get(rule["key"])
    if isinstance(kinds, (list, tuple)):
        if layer is not None:
            return bool(of_layer(rule["key"], kinds, layer, "hash_routing") == rule["value"])
        return 2 * list(kinds).count(rule["value"]) > len(kinds)
    first = values.get(rule["first_key"])
    return layer is not None and bool(layer < (first if isinstance(first, int) else rule["first_default"]))
