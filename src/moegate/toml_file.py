"""Reads TOML files of the package."""

from __future__ import annotations

import sys
from importlib import resources
from typing import Any


def read_toml(package: str, name: str) -> dict[str, Any]:
    """A data file of a package: `read_toml("moegate.catalog", "models.toml")`."""
    if sys.version_info >= (3, 11):  # imported here, since `import moegate` reads no TOML file
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(resources.files(package).joinpath(name).read_text(encoding="utf-8"))
