"""The rules of CONTRIBUTING.md that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from floors import FLOORS, imports, leads_up, name_on_a_floor

ROOT = Path(__file__).parent.parent
CONTRACT = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")
MAX_LINES, MAX_FUNCTION = 300, 50


def test_every_clause_of_the_contract_names_tests_that_exist() -> None:
    clauses = re.findall(r"^\*\*(\d\.\d)\b.*?(?=^\*\*\d\.\d|^## )", CONTRACT, flags=re.MULTILINE | re.DOTALL)
    texts = re.split(r"^(?=\*\*\d\.\d)", CONTRACT, flags=re.MULTILINE)[1:]
    assert len(texts) == len(clauses) >= 19
    for text in texts:
        clause = text[2:5]
        references = re.findall(
            r"`((?:gpu/)?test_\w+\.py)?(?:::)?(test_\w+)?`", text.split("\n— ", 1)[1].split("\n\n")[0]
        )
        assert references, f"clause {clause} names no test"
        file = ""
        for named_file, test in references:
            file = named_file or file
            source = (ROOT / "tests" / file).read_text(encoding="utf-8")
            assert not test or f"def {test}(" in source, f"clause {clause}: no {test} in {file}"


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_pre_commit_and_ci_use_the_same_tools(tool: str) -> None:
    pinned = re.search(rf"^{tool}==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    hook = re.search(rf"{tool}.*\n    rev: v(\S+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert pinned is not None
    assert hook is not None
    assert hook.group(1) == pinned.group(1)


def test_the_version_of_torch_is_said_once() -> None:
    """tools/environment.py runs before anything is installed, and has its own copy of pyproject.toml's range."""
    range_start = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    oldest = re.search(r"OLDEST_TORCH = \((\d+), (\d+)\)", (ROOT / "tools" / "environment.py").read_text())
    assert range_start is not None
    assert oldest is not None
    assert oldest.groups() == range_start.groups()


def test_every_module_has_a_floor() -> None:
    modules = imports()
    for module in modules:
        assert name_on_a_floor(module), (
            f"{module}: add it to FLOORS in tests/support/floors.py, above all that it imports"
        )
    gone = {name for names in FLOORS for name in names} - {name_on_a_floor(module) for module in modules}
    assert not gone, f"FLOORS in tests/support/floors.py names what is no module: {gone}"


def test_no_import_leads_up() -> None:
    up = [f"{one} -> {other}" for one, others in imports().items() for other in others if leads_up(one, other)]
    assert not up, "these lead to no floor below, by tests/support/floors.py: " + ", ".join(sorted(up))


def test_no_imports_form_a_circle() -> None:
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail(f"a circle, each imported by the next: {' -> '.join(error.args[1])}")


def test_files_and_functions_are_short() -> None:
    folders = [ROOT / name for name in ("src", "tests", "tools", "benchmarks")]
    files = [file for folder in folders for file in folder.rglob("*") if file.suffix in (".py", ".cuh")]
    assert len(files) > 200
    found = [text for file in files for text in too_long(file)]
    assert not found, f"allowed: {MAX_LINES} lines a file, {MAX_FUNCTION} a function; {', '.join(found)}"


def too_long(file: Path) -> Iterator[str]:
    """What is too long in a file: the file itself, and functions, counted from def to end."""
    text, where = file.read_text(encoding="utf-8"), file.relative_to(ROOT)
    lines = len(text.splitlines())
    if lines > MAX_LINES:
        yield f"{where} has {lines}"
    for node in ast.walk(ast.parse(text)) if file.suffix == ".py" else ():
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > MAX_FUNCTION:
                yield f"{node.name} in {where} has {lines}"


@pytest.mark.parametrize(
    ("page", "writer"),
    [("configs.md", "tools/configs_page.py"), ("tensors.md", "tools/tensors_page.py")],
)
def test_pages_that_are_written_from_data_are_up_to_date(page: str, writer: str) -> None:
    printed = subprocess.run([sys.executable, ROOT / writer], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == printed


def test_the_page_of_the_kernels_names_each_file() -> None:
    page = (ROOT / "docs" / "cuda.md").read_text(encoding="utf-8")
    listed = page.partition("\n    kernels/ ")[2].partition("\n  choice/")[0]
    assert sorted(re.findall(r"\w+\.cuh", listed)) == sorted(
        file.name for file in (ROOT / "src" / "moegate").rglob("*.cuh")
    )
