"""The rules of the house that a program can hold."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CONTRACT = (ROOT / "docs" / "contract.md").read_text(encoding="utf-8")


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
    """tools/environment.py runs before anything is installed, so that it repeats the range of pyproject.toml."""
    range_start = re.search(r'"torch>=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    oldest = re.search(r"OLDEST_TORCH = \((\d+), (\d+)\)", (ROOT / "tools" / "environment.py").read_text())
    assert range_start is not None
    assert oldest is not None
    assert oldest.groups() == range_start.groups()


@pytest.mark.parametrize("name", ["config", "lookup", "model_types", "parts", "stated"])
def test_what_reads_configs_knows_no_spec(name: str) -> None:
    """`RouterSpec.from_config` calls the reader, so that the reader importing RouterSpec would be a circle."""
    tree = ast.parse((ROOT / "src" / "moegate" / "catalog" / f"{name}.py").read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {module for module in imported if module in ("moegate", "moegate.spec", "moegate.catalog")}


@pytest.mark.parametrize(
    ("page", "writer"),
    [("configs.md", "tools/configs_page.py")],
)
def test_pages_that_are_written_from_data_are_up_to_date(page: str, writer: str) -> None:
    printed = subprocess.run([sys.executable, ROOT / writer], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / page).read_text(encoding="utf-8") == printed
