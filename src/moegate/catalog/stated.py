"""Nothing dropped: what a config states of its router and its type's table does not read is warned of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moegate.catalog.lookup import at, text_of
from moegate.catalog.model_types import ModelType, routing_keys
from moegate.warn import warn_once

# What a field is where the tables say nothing: RouterSpec's own defaults, of the fields that keys state.
_PLAIN: dict[str, Any] = {
    "scoring_func": "softmax",
    "n_group": 1,
    "topk_group": 1,
    "renormalize": False,
    "routed_scaling_factor": 1.0,
    "num_zero_experts": 0,
    "num_shared_gates": 0,
    "logit_multiplier": 1.0,
    "linear_bias": False,
    "select_per_group": False,
}


def warn_of_keys_not_followed(fields: dict[str, Any], values: dict[str, Any], model_type: ModelType) -> None:
    """Warns, once for each text, of a routing key whose value the spec does not have and no entry explains."""
    for key, value, name, stated in _statements(values):
        if key in model_type.ignores or _is_followed(key, name, values, model_type):
            continue
        has = fields.get(name, _PLAIN.get(name))
        if not _agree(name, stated, has):
            warn_once(
                f"config of model_type {model_type.name!r}: {key} = {text_of(value)} is not followed; "
                f"the router has {name} = {has!r}"
            )


def _statements(values: dict[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """(key, value, RouterSpec field, what the value states of that field) for each routing key of a config."""
    known = routing_keys()
    for name, keys in known.states.items():
        for key in keys:
            value = at(values, key)
            if value is not None and not isinstance(value, (list, tuple, dict)):
                yield key, value, name, value
    for key, meanings in known.means.items():
        value = at(values, key)
        for name, stated in meanings.get(text_of(value), {}).items() if value is not None else ():
            yield key, value, name, stated


def _is_followed(key: str, name: str, values: dict[str, Any], model_type: ModelType) -> bool:
    """True if the field was read from this key, or the key decided something else that the table says."""
    first = next((other for other in model_type.keys_of(name) if at(values, other) is not None), None)
    if key == first:
        return True
    rules = [*model_type.choices.values(), *model_type.becomes]
    return any(rule["key"] == key for rule in rules)


def _agree(name: str, stated: Any, has: Any) -> bool:
    if name == "correction_bias":  # stated as true or false; where the bias goes is the type's
        return bool(stated) == (has is not None)
    if isinstance(stated, (int, float)) and isinstance(has, (int, float)):
        return float(stated) == float(has)
    return bool(stated == has)
