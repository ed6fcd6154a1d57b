"""The floors of src/moegate, and which module imports which."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "moegate"

# Lowest first. A name stands for a module, or for a package with all its modules that are not listed; "__init__" is
# `moegate` itself. A module imports from the floors below its own, and from modules under the same name. Two names on
# one floor do not import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_version", "cache_folder", "lfs", "toml_file", "warn", "whole_file"),
    ("json_file",),
    ("configs",),
    ("spec_values",),
    ("spec",),
    ("machine", "plain"),
    ("routing",),
    ("arguments", "chunks", "contract", "problem"),
    ("catalog", "cuda"),
    ("flashinfer", "halves"),
    ("gemm", "selection"),
    ("choice",),
    ("gate_tensors", "look", "ops"),
    ("from_checkpoint", "functional", "noticing"),
    ("takes_note",),
    ("gate", "gate_linear", "top_k"),
    ("__init__", "synthetic"),
    ("integrations.engines", "integrations.takeover", "measure"),
    ("integrations", "report"),
    ("cli",),
    ("__main__",),
)
_FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def name_on_a_floor(module: str) -> str | None:
    """The longest name in FLOORS that contains a module; None: there is none."""
    parts = module.split(".")
    starts = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((name for name in starts if name in _FLOOR_OF), None)


def leads_up(importer: str, imported: str) -> bool:
    """True if a module imports from its own floor or a higher one, under another name."""
    upper, lower = name_on_a_floor(importer), name_on_a_floor(imported)
    assert upper is not None, importer
    assert lower is not None, imported
    return upper != lower and _FLOOR_OF[lower] >= _FLOOR_OF[upper]


def imports() -> dict[str, set[str]]:
    """By module of moegate (without "moegate."): the modules that its file imports anywhere.

    Imports inside functions and for type checkers count. Importing a module of a package does not count as importing
    the package's `__init__`; naming the package, or something defined in its `__init__`, does.
    """
    files = {_module_of(file): file for file in SOURCE.rglob("*.py")}
    return {module: set(_imported(file, files)) - {module} for module, file in files.items()}


def _module_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def _imported(file: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}, line {node.lineno}: a relative import; allowed: from moegate..."
            named = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in named:
            if name.split(".")[0] == "moegate":
                yield _nearest(name, modules)


def _nearest(name: str, modules: Mapping[str, Path]) -> str:
    """The module of a dotted name: "spec" for "moegate.spec.RouterSpec"."""
    while name != "moegate":
        module = name.removeprefix("moegate.")
        if module in modules:
            return module
        name = name.rpartition(".")[0]
    return "__init__"
