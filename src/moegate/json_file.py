"""Reads JSON files of others: every fault of a file is a `ValueError` that names the file."""

from __future__ import annotations

import json
from typing import Any, Protocol

from moegate.lfs import EXPLANATION, POINTER


class Readable(Protocol):
    """A `Path`, or a resource of a package."""

    def read_text(self, encoding: str) -> str:
        """The file's text."""
        ...


def read_json(path: Readable, what: str) -> Any:
    """The content of a JSON file in UTF-8.

    Args:
        path: The file.
        what: The user's word for the file, in front of its path: "the cost table".

    Raises:
        ValueError: The file is missing, cannot be read, is no UTF-8 or no JSON, or is nested too deeply.
    """
    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text)
    except OSError as error:
        reason = error.strerror or str(error)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason} at byte {error.start}"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:
        reason = EXPLANATION if text.startswith(POINTER) else f"not JSON: {error}"
    raise ValueError(f"{what} {path} cannot be used: {reason}")
