"""What `RouterSpec` says of a field that is wrong."""

from __future__ import annotations


def require(holds: bool, field: str, value: object, allowed: str) -> None:
    """Refuses a value, by a `ValueError` that names its field and what is allowed."""
    if not holds:
        raise ValueError(f"RouterSpec.{field} = {value!r}; allowed: {allowed}")


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
