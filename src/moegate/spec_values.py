"""The allowed values and types of the fields of a `RouterSpec`."""

from __future__ import annotations

from typing import Literal, get_args

ScoringFunc = Literal["softmax", "sigmoid", "sqrtsoftplus", "identity"]
CorrectionBias = Literal["score", "logit"]
GroupScore = Literal["top2_sum", "max", "topj_sum"]
WeightsFrom = Literal["score", "softmax_of_selected", "sigmoid_of_selected"]
LogitsDtype = Literal["float32", "bfloat16"]
GateWeightDtype = Literal["model", "float32"]
WeightsDtype = Literal["float32", "bfloat16", "float16"]

CHOICES: dict[str, tuple[object, ...]] = {
    "scoring_func": get_args(ScoringFunc),
    "correction_bias": (None, *get_args(CorrectionBias)),
    "group_score": get_args(GroupScore),
    "weights_from": get_args(WeightsFrom),
    "logits_dtype": get_args(LogitsDtype),
    "weight_dtype": get_args(GateWeightDtype),
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
