"""The check of the types of `RouterSpec`'s fields."""

from __future__ import annotations


def check_type(field: str, annotation: str, value: object) -> None:
    """Refuses what a dataclass would take silently: a bool for an int, a string for a float."""
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
