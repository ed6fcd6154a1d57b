"""Names of contestants and of records; without PyTorch, which a report does not need."""

from pathlib import Path
from typing import Any

RecordRow = dict[str, Any]
"""A row of a record, such as bench.json: one measured case, with the findings on each contestant by name."""

DEFAULT = "moegate"
"""A frozen gate with the default plan."""
NOT_FROZEN = ", not frozen"
"""Ends the name of a contestant whose gates are not frozen; without this end, the gates are frozen."""
DEFAULT_NOT_FROZEN = DEFAULT + NOT_FROZEN
NO_PDL = f"{DEFAULT}, pdl=False"
GIVEN_OUT = f"{DEFAULT}, out="
EAGER = "PyTorch eager"
"""moegate's torch backend."""
COMPILED = "torch.compile"
PAIR = "FlashInfer pair"
"""FlashInfer's GEMM and its top-k."""
TRANSFORMERS = "Transformers' router"
"""The router class of the installed Transformers."""
TRANSFORMERS_OPS = "Transformers ops"
"""The operations of Transformers' softmax routers, without the class."""
FLOOR = "floor"
PREDECESSOR = "predecessor alone"


def check_words(path: Path, rows: list[RecordRow]) -> None:
    """Raises a ValueError for rows of before what is timed was called a contestant, and the names were changed."""
    if any("candidates" in row for row in rows):
        raise ValueError(
            f"{path} was written by an earlier moegate, which had other names for what it timed; allowed: a record of "
            "this version, measured anew in another folder"
        )
