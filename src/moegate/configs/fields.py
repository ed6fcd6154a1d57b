"""Translates a Hugging Face config.json into the fields of a RouterSpec, by the tables of types/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from moegate.configs.lookup import at, check_layer, has, of_layer, text_of
from moegate.configs.model_types import ModelType
from moegate.configs.routing_part import routing_config
from moegate.configs.stated import warn_of_keys_not_followed

_NULL_MEANS_ONE = ("n_group", "topk_group", "routed_scaling_factor")
_ABSENT = object()


class Found(NamedTuple):
    """The value of one RouterSpec field."""

    value: Any
    """`_ABSENT`: neither config nor table states one; RouterSpec's default applies."""
    by: str | None = None
    """The config key with the value; None: the value is the table's."""


class RouterFields(NamedTuple):
    """The router that a config states."""

    model_type: str
    fields: dict[str, Any]
    """The arguments of RouterSpec."""
    read_from: dict[str, str]
    """By field, the config key with the value."""


def router_fields(config: object, *, layer: object = None) -> RouterFields:
    """See `RouterSpec.from_config`."""
    layer = None if layer is None else check_layer(layer)
    values, model_type = routing_config(config)
    values = {**values, **_of_blocks(values, layer), **_of_layers(values, layer)}
    _check_has_experts(values, model_type)
    found = {name: _field(name, values, model_type, layer) for name in model_type.fields}
    fields = {name: field.value for name, field in found.items() if field.value is not _ABSENT}
    if fields["num_experts"] in (0, 1, None):  # some families state 1 for their dense models
        raise _no_experts(model_type, f"{found['num_experts'].by} = {text_of(fields['num_experts'])}")
    _settle(fields, values, model_type)
    read_from = {name: field.by for name, field in found.items() if field.by is not None}
    warn_of_keys_not_followed(values, model_type, fields, read_from)
    rule = model_type.hash_routing_layers
    if rule is not None and _is_hash_layer(values, rule, layer):
        fields.update(hash_routing=True, correction_bias=None)
    return RouterFields(model_type.name, fields, read_from)


def _settle(fields: dict[str, Any], values: dict[str, Any], model_type: ModelType) -> None:
    """Applies "Values that are not copied as they stand" of types/README.md."""
    if fields.get("logits_dtype") == "model":
        fields["logits_dtype"] = "bfloat16" if values.get("dtype", model_type.dtype) == "bfloat16" else "float32"
    if fields.get("logit_softcapping") == 0:
        fields["logit_softcapping"] = None
    if not fields.get("renormalize"):  # the epsilon and the floor apply to the renormalising sum only
        fields.pop("renormalize_eps", None)
        fields.pop("renormalize_floor", None)


def _check_has_experts(values: dict[str, Any], model_type: ModelType) -> None:
    """Refuses dense models, by the type's `dense` rules."""
    for rule in model_type.dense:
        value = at(values, rule["key"])
        lacks = isinstance(value, (str, list, tuple)) and "without" in rule and rule["without"] not in value
        is_dense = has(values, rule["key"]) and "is" in rule and value == rule["is"]
        if lacks or is_dense or ("unless" in rule and value != rule["unless"]):
            stated = f"{rule['key']} = {text_of(value)}" if has(values, rule["key"]) else f"no {rule['key']}"
            raise _no_experts(model_type, f"{rule['key']} has no {rule['without']!r}" if lacks else stated)


def _no_experts(model_type: ModelType, why: str) -> ValueError:
    return ValueError(f"config of model_type {model_type.name!r}: this model has no experts ({why})")


def _field(name: str, values: dict[str, Any], model_type: ModelType, layer: int | None) -> Found:
    """The value of one field: from the type's choices, keys, defaults or spec, in this order."""
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


def _of_layers(values: dict[str, Any], layer: int | None) -> dict[str, Any]:
    """The keys of `per_layer_config`: for this layer, or for all layers as lists if each layer has an entry."""
    layers = values.get("per_layer_config")
    if layers is None:
        return {}
    entries = dict(enumerate(layers)) if isinstance(layers, (list, tuple)) else layers
    if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping) for entry in entries.values()):
        allowed = "a dict of dicts by layer, or their list"
        raise ValueError(f"config: per_layer_config = {text_of(layers)}; allowed: {allowed}")
    by_layer = {str(number): dict(entry) for number, entry in entries.items()}  # keys are str in JSON, int in memory
    if layer is not None:
        return by_layer.get(str(layer), {})
    count = values.get("num_hidden_layers")
    if not isinstance(count, int) or not all(str(number) in by_layer for number in range(count)):
        return {}  # the config's own keys, which are those of the layers without an entry
    return _as_lists([by_layer[str(number)] for number in range(count)], values)


def _of_blocks(values: dict[str, Any], layer: int | None) -> dict[str, Any]:
    """The keys of `block_configs`: for this layer, or for all layers as lists."""
    blocks = values.get("block_configs")
    if not isinstance(blocks, (list, tuple)):
        return {}
    found = [dict(block) if isinstance(block, Mapping) else {} for block in blocks]
    if layer is not None:
        return dict(of_layer("block_configs", found, layer, "its router"))
    return _as_lists(found, values)


def _as_lists(entries: list[dict[str, Any]], values: dict[str, Any]) -> dict[str, Any]:
    """By key, the list of the layers' values; a layer without the key has the config's value, if there is one."""
    keys = dict.fromkeys(key for entry in entries for key in entry)
    return {
        key: [entry.get(key, values.get(key)) for entry in entries if key in entry or key in values] for key in keys
    }


def _is_hash_layer(values: dict[str, Any], rule: dict[str, Any], layer: int | None) -> bool:
    kinds = values.get(rule["key"])
    if isinstance(kinds, (list, tuple)):
        if layer is not None:
            return bool(of_layer(rule["key"], kinds, layer, "hash_routing") == rule["value"])
        return 2 * list(kinds).count(rule["value"]) > len(kinds)
    first = values.get(rule["first_key"])
    if first is not None and (not isinstance(first, int) or isinstance(first, bool)):
        raise ValueError(f"config: {rule['first_key']} = {text_of(first)}; allowed: an int, or null")
    return layer is not None and layer < (rule["first_default"] if first is None else first)
