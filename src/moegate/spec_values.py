"""The allowed values and types of the fields of a `RouterSpec`, and what is computed of the fields once."""

from __future__ import annotations

import dataclasses
import json
from functools import cached_property
from typing import Any, ClassVar, Literal, get_args

ScoringFunc = Literal["softmax", "sigmoid", "sqrtsoftplus", "identity"]
CorrectionBias = Literal["score", "logit"]
GroupScore = Literal["top2_sum", "max", "topj_sum"]
WeightsFrom = Literal["score", "softmax_of_selected", "sigmoid_of_selected"]
LogitsDtype = Literal["float32", "bfloat16"]
IdsDtype = Literal["int32", "int64"]
GateWeightDtype = Literal["model", "float32"]
WeightsDtype = Literal["float32", "bfloat16", "float16"]

CHOICES: dict[str, tuple[object, ...]] = {
    "scoring_func": get_args(ScoringFunc),
    "correction_bias": (None, *get_args(CorrectionBias)),
    "group_score": get_args(GroupScore),
    "weights_from": get_args(WeightsFrom),
    "logits_dtype": get_args(LogitsDtype),
    "weight_dtype": get_args(GateWeightDtype),
    "topk_ids_dtype": get_args(IdsDtype),
    "topk_weights_dtype": get_args(WeightsDtype),
}
"""The allowed values of each field with a fixed set of values."""


def check_type(field: str, annotation: str, value: object) -> None:
    """Raises a `TypeError` for what a dataclass accepts silently: a bool for an int, a string for a float."""
    expected: tuple[type, ...]
    if annotation.startswith("int"):
        expected = (int,)
    elif annotation.startswith("float"):
        expected = (int, float)
    elif annotation == "bool":
        expected = (bool,)
    else:
        return  # a Literal, whose values are looked up
    if value is None and annotation.endswith("None"):
        return
    if not isinstance(value, expected) or (isinstance(value, bool) and expected != (bool,)):
        raise TypeError(f"RouterSpec.{field} must be {annotation}, got {type(value).__name__} {value!r}")


class KeptOnce:
    """A frozen dataclass whose hash and text are computed once.

    Specs are keys of caches, and compiled code passes specs to operators as text.
    """

    _text: ClassVar[str]
    """JSON of the fields that differ from their defaults; an attribute, since compiled code cannot read a property."""

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(self.__getstate__().values()))

    def __getstate__(self) -> dict[str, Any]:
        # Without cached properties: strings have other hashes in another process.
        return {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._keep_text()

    def _keep_text(self) -> None:
        """Sets `_text` from the fields."""
        defaults = {each.name: each.default for each in dataclasses.fields(self)}  # type: ignore[arg-type]
        values = self.__getstate__().items()
        vars(self)["_text"] = json.dumps({name: value for name, value in values if value != defaults[name]})
