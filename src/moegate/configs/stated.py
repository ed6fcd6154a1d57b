"""Warns of routing keys of a config that contradict the fields that were read: nothing is dropped silently."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from moegate.configs.lookup import at, text_of
from moegate.configs.model_types import ModelType, routing_keys
from moegate.warn import warn_once

# RouterSpec's defaults of the fields that routing keys can state.
_PLAIN: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "renormalize": False,
    "routed_scaling_factor": 1.0,
    "num_zero_experts": 0,
    "num_shared_gates": 0,
    "logit_multiplier": 1.0,
    "linear_bias": False,
    "logits_dtype": "float32",
}
_SCORE_OF_SELECTED = {"softmax_of_selected": "softmax", "sigmoid_of_selected": "sigmoid"}


class Statement(NamedTuple):
    """What a config key states about one RouterSpec field."""

    key: str
    value: Any
    field: str
    stated: Any
    """The field's value according to the key."""


def warn_of_keys_not_followed(
    values: dict[str, Any], model_type: ModelType, fields: dict[str, Any], read_from: dict[str, str]
) -> None:
    """Warns, once for each text, of a routing key that states another router than the one that was read.

    Args:
        values: The config.
        model_type: The config's type.
        fields: The RouterSpec fields that were read.
        read_from: By field, the config key with the value; the other fields are from the type's table.
    """
    got = _as_stated(fields)
    for key, value, name, stated in _statements(values):
        if key in model_type.ignores or _has_a_say(key, name, model_type, read_from):
            continue
        if not _agree(stated, got[name]):
            warn_once(
                f"config of model_type {model_type.name!r}: {key} = {text_of(value)} is not followed; "
                f"the router has {name} = {got[name]!r}"
            )


def _statements(values: dict[str, Any]) -> Iterator[Statement]:
    """The statements of the routing keys in a config. Lists, with an entry for each layer, are left out."""
    known = routing_keys()
    for name, keys in known.states.items():
        for key in keys:
            value = at(values, key)
            if value is not None and not isinstance(value, (list, tuple, dict)):
                yield Statement(key, value, name, value)
    for key, meanings in known.means.items():
        value = at(values, key)
        for name, stated in meanings.get(text_of(value), {}).items() if value is not None else ():
            yield Statement(key, value, name, stated)


def _has_a_say(key: str, name: str, model_type: ModelType, read_from: dict[str, str]) -> bool:
    """True if the field was read from the key, or a rule of the type's table uses the key."""
    rules = [*model_type.choices.values(), *model_type.becomes]
    if any(rule["key"] == key for rule in rules):
        return True
    choice = model_type.choices.get(name)
    return read_from.get(name) in (key, *([] if choice is None else [choice["key"]]))


def _as_stated(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as configs state them: no key states a softmax or sigmoid over the selected experts alone."""
    got = {**dict.fromkeys(routing_keys().states), **_PLAIN, **fields}
    got["scoring_func"] = _SCORE_OF_SELECTED.get(fields.get("weights_from", "score"), got["scoring_func"])
    if fields.get("weights_from") == "softmax_of_selected":
        got["renormalize"] = True
    # A config states only whether there is a correction bias; the type decides what it is added to.
    got["correction_bias"] = fields.get("correction_bias") is not None
    got["logit_softcapping"] = fields.get("logit_softcapping") or 0.0
    if got["n_group"] == 1:
        got["topk_group"] = None  # any value agrees
    return got


def _agree(stated: Any, got: Any) -> bool:
    if got is None or isinstance(got, bool):
        return got is None or bool(stated) == got
    if isinstance(stated, (int, float)) and isinstance(got, (int, float)):
        return bool(stated == got)
    return bool(stated == got)
