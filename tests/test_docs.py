"""The API reference shows every public name with its docstring; links between documents lead somewhere."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable
from functools import cached_property
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import (
    PAGES,
    ROOT,
    anchors_of,
    blocks_of,
    docstring_of,
    fields_of,
    links_of,
    public_objects,
    shown,
    spans_of,
)

import moegate
from moegate.cli import app

WRITER = ROOT / "tools" / "api_reference.py"
PUBLIC = public_objects()
COMMANDS: Any = typer.main.get_command(app)
# ---------------------------------------------------------------------------------------------------------------------
# The API reference
# ---------------------------------------------------------------------------------------------------------------------


class Reference(HTMLParser):
    """A page of the reference: its ids, its internal links, and the text behind each id."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.anchors: set[str] = set()
        self.text: dict[str, str] = {"": ""}
        self._at = ""
        self._hidden = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        name = given.get("id")
        if name:
            self.ids.add(name)
        if name and tag in ("section", "div", "h2"):
            self._at = name
            self.text.setdefault(name, "")
        if (given.get("href") or "").startswith("#"):
            self.anchors.add((given["href"] or "")[1:])
        if "pdoc-code" in (given.get("class") or ""):
            self._hidden = tag  # the source

    def handle_endtag(self, tag: str) -> None:
        self._hidden = "" if tag == self._hidden else self._hidden

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.text[self._at] += data


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    """The pages of `make docs`, by path; warnings are errors."""
    folder = tmp_path_factory.mktemp("reference")
    done = subprocess.run([sys.executable, "-W", "error", WRITER, folder], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return {
        str(file.relative_to(folder)): Reference(file.read_text(encoding="utf-8")) for file in folder.rglob("*.html")
    }


def place_of(name: str) -> tuple[str, str]:
    """The page and the id of a public name."""
    module = re.match(r"(catalog|integrations\.transformers)\.", name)
    return (f"moegate/{module[1].replace('.', '/')}.html", name[module.end() :]) if module else ("moegate.html", name)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_shows_every_public_name(name: str, reference: dict[str, Reference]) -> None:
    page, anchor = place_of(name)
    assert anchor in reference[page].ids
    first_line = docstring_of(name).partition("\n")[0]
    assert first_line
    assert plain(first_line) in plain(reference[page].text[anchor])


@pytest.mark.parametrize("name", PUBLIC)
def test_the_reference_shows_sections_with_their_entries(name: str, reference: dict[str, Reference]) -> None:
    page, anchor = place_of(name)
    text = reference[page].text[anchor]
    for title, entries in sections(docstring_of(name)).items():
        assert f"\n{'Arguments' if title == 'Args' else title}:\n" in text
        for entry, told in entries.items():
            assert entry == "" or re.search(rf"\b{entry}\b[^\n]*:", text), f"{title} without {entry}"
            assert plain(told.partition("\n")[0]) in plain(text)


@pytest.mark.parametrize("name", COMMANDS.commands)
def test_the_reference_shows_every_command_with_its_options(name: str, reference: dict[str, Reference]) -> None:
    text = reference["moegate/cli.html"].text[f"moegate-{name}"]
    for param in COMMANDS.commands[name].params:
        assert (param.opts[0] if param.opts[0].startswith("-") else param.metavar.strip("[]. ")) in text
        assert plain(param.help.replace("\\", "")) in plain(text)


def test_links_within_the_reference_lead_somewhere(reference: dict[str, Reference]) -> None:
    assert {page: found.anchors - found.ids for page, found in reference.items() if found.anchors - found.ids} == {}


def test_public_names() -> None:
    """The names that the tests above check: all that `moegate` exports, and the members of its classes."""
    assert set(moegate.__all__) - {"__version__", "catalog"} <= set(PUBLIC)
    assert {"Gate.forward", "Gate.from_checkpoint", "Routing.topk_ids", "RouterSpec.from_config"} <= set(PUBLIC)
    assert {"catalog.get_model", "catalog.Model.spec"} <= set(PUBLIC)
    assert {"integrations.transformers.patch", "integrations.transformers.Takeover.left"} <= set(PUBLIC)
    assert "Gate.register_buffer" not in PUBLIC


# ---------------------------------------------------------------------------------------------------------------------
# Docstrings
# ---------------------------------------------------------------------------------------------------------------------


sections: Callable[[str], dict[str, dict[str, str]]] = runpy.run_path(str(WRITER), run_name="reference")["sections"]
"""See tools/api_reference.py."""


def missing(value: Any) -> list[str]:
    """What a docstring of a function or class lacks: arguments, the result, or errors."""
    function = inspect.unwrap(getattr(value, "__func__", value))
    if isinstance(value, (property, cached_property)) or not callable(function):
        return []
    signature = inspect.signature(function)
    found = sections(inspect.getdoc(value) or "")
    arguments = {name for name in signature.parameters if name not in ("self", "cls")}
    fields = {name for name, text in fields_of(value).items() if text} if inspect.isclass(value) else set()
    lacks = ["Args"] if arguments - set(found.get("Args", {})) - fields else []
    if inspect.isclass(value):
        return lacks
    returns = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    if arguments and returns and "Returns" not in found:  # without arguments, the first line describes the result
        lacks.append("Returns")
    if raised_by(function) - set(found.get("Raises", {})):
        lacks.append("Raises")
    return lacks


def raised_by(function: Any) -> set[str]:
    """The errors in the raise statements of a function's source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    return {call.func.id for call in raised if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)}


def plain(text: str) -> str:
    """Text without Markdown's marks, with single blanks."""
    return " ".join(re.sub(r"[`*\\]", "", text).split())


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_say_what_goes_in_and_out(name: str) -> None:
    assert missing(PUBLIC[name]) == []


def test_a_docstring_that_leaves_something_out_is_found() -> None:
    def bare(first: int, second: int) -> int:
        """Adds.

        Args:
            first: A number.
        """
        if second < 0:
            raise ValueError(second)
        return first + second

    def whole(first: int) -> int:
        """Adds one.

        Args:
            first: A number,
                on two lines.

        Returns:
            The sum.

        Raises:
            TypeError, ValueError: Never.
        """
        if first < 0:
            raise ValueError(first)
        return first + 1

    assert missing(bare) == ["Args", "Returns", "Raises"]
    assert missing(whole) == []
    assert sections(inspect.getdoc(whole) or "") == {
        "Args": {"first": "A number,\n    on two lines."},
        "Returns": {"": "The sum."},
        "Raises": {"TypeError": "Never.", "ValueError": "Never."},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------------------------------


def dead_links(page: Path, text: str) -> list[str]:
    """The links of a page that lead nowhere, with their lines; links outside of the repository are not checked."""
    dead = []
    for line, target in (link for link in links_of(text) if not re.match(r"[a-z]+:", link.target)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if file != page and not (file.exists() and file.is_relative_to(ROOT)):
            dead.append(f"{shown(page)}:{line}: {target}")
        elif anchor and anchor not in anchors_of(text if file == page else file.read_text(encoding="utf-8")):
            dead.append(f"{shown(page)}:{line}: {target}: no such heading")
    return dead


def missing_files(page: Path, text: str, folders: str) -> list[str]:
    """The missing files below these folders that a page names in inline code."""
    named = [(span.line, span.target) for span in spans_of(text) if re.match(rf"({folders})/[\w./-]+\w$", span.target)]
    return [f"{shown(page)}:{line}: {file}" for line, file in named if not (ROOT / file).exists()]


def unknown_names(page: Path, text: str) -> list[str]:
    """The names of source files, in inline code and text blocks, that are no files of the repository."""
    known = {
        file.name
        for folder in ("src", "tests", "benchmarks", "tools", "examples")
        for file in (ROOT / folder).rglob("*.*")
    }
    places = [(span.line, span.target) for span in spans_of(text)]
    places += [(block.line, block.code) for block in blocks_of(text, page) if block.language == "text"]
    named = [(line, name) for line, code in places for name in re.findall(r"[\w-]+\.(?:py|cuh|toml)\b", code)]
    return [f"{shown(page)}:{line}: {name}" for line, name in named if name not in known | {"pyproject.toml"}]


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_links_lead_somewhere(page: Path) -> None:
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_files_that_are_named_exist(page: Path) -> None:
    assert missing_files(page, page.read_text(encoding="utf-8"), "docs|tests|benchmarks|tools") == []


@pytest.mark.parametrize("page", PAGES, ids=shown)
def test_source_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert missing_files(page, text, "src") == []
    assert unknown_names(page, text) == []


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "index.md"
    linked = {(index.parent / target.partition("#")[0]).resolve() for _, target in links_of(index.read_text())}
    assert set((ROOT / "docs").rglob("*.md")) - {index} <= linked
    assert index in {(ROOT / target).resolve() for _, target in links_of((ROOT / "README.md").read_text())}


@pytest.mark.parametrize(
    ("text", "dead"),
    [
        ("[a](contract.md), [b](contract.md#1-logits), [c](#a-heading), [d](https://example.org/x)", []),
        ("\n[a](no_such_page.md)", ["docs/page.md:4: no_such_page.md"]),
        ("![a](no_such_image.png)", ["docs/page.md:3: no_such_image.png"]),
        ("[a](contract.md#7-no-such)", ["docs/page.md:3: contract.md#7-no-such: no such heading"]),
        ("[a](#no-such)", ["docs/page.md:3: #no-such: no such heading"]),
        ("[a](../../outside.md)", ["docs/page.md:3: ../../outside.md"]),
    ],
)
def test_a_dead_link_is_found(text: str, dead: list[str]) -> None:
    assert dead_links(ROOT / "docs" / "page.md", f"# A `heading`\n\n{text}\n") == dead


def test_a_file_that_is_not_there_is_found() -> None:
    text = "`tests/test_docs.py`, `tests/test_no_such.py` and `tests/test_*.py`"
    assert missing_files(ROOT / "docs" / "page.md", text, "tests") == ["docs/page.md:1: tests/test_no_such.py"]
    text = "`select.cuh`, `no_such.cuh`\n\n```text\nsrc/\n  spec.py\n  no_such.py\n```\n"
    found = ["docs/page.md:1: no_such.cuh", "docs/page.md:4: no_such.py"]
    assert unknown_names(ROOT / "docs" / "page.md", text) == found
