"""The project's documents as tests read them: code blocks, links and headings of Markdown files and docstrings."""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from markdown_it import MarkdownIt
from markdown_it.token import Token
from torch import nn

import moegate
from moegate import catalog
from moegate.integrations import transformers

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "src").rglob("*.md"),
    ]
)
_PARSER = MarkdownIt("commonmark").enable("table")


class Block(NamedTuple):
    """A block of code."""

    file: Path
    line: int
    """The line of the block's first line of code, from 1."""
    language: str
    """The first word behind the fence; "" if there is none."""
    needs_gpu: bool
    """The second word is `gpu`."""
    code: str

    def __str__(self) -> str:
        return f"{shown(self.file)}:{self.line}"


class Link(NamedTuple):
    """A link, or the text of an inline code span."""

    line: int
    target: str


def shown(file: Path) -> str:
    """A file's path in the repository."""
    return str(file.relative_to(ROOT)) if file.is_relative_to(ROOT) else str(file)


def blocks_of(text: str, file: Path) -> list[Block]:
    """The blocks of code in the text of a file."""
    found = []
    for token in _PARSER.parse(text):
        if token.type in ("fence", "code_block"):  # a code_block is indented, and states no language
            language, _, mark = token.info.strip().partition(" ")
            if mark not in ("", "gpu"):
                raise ValueError(f"{shown(file)}:{_line(token)}: got {mark!r} behind {language}; allowed: gpu")
            found.append(Block(file, _line(token) + (token.type == "fence"), language, mark == "gpu", token.content))
    return found


def links_of(text: str) -> list[Link]:
    """The links of a page."""
    return [
        Link(line, str(child.attrs["src" if child.type == "image" else "href"]))
        for line, child in _inline(text)
        if child.type in ("link_open", "image")
    ]


def spans_of(text: str) -> list[Link]:
    """The inline code of a page."""
    return [Link(line, child.content) for line, child in _inline(text) if child.type == "code_inline"]


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    anchors: list[str] = []
    tokens = _PARSER.parse(text)
    for opening, inline in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            title = "".join(child.content for child in inline.children or ())
            anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
            anchors.append(anchor if anchor not in anchors else f"{anchor}-{anchors.count(anchor)}")
    return set(anchors)


@cache
def public_objects() -> dict[str, Any]:
    """The public objects by name: the names of the public modules, and members of their classes."""
    found: dict[str, Any] = {}
    for module, prefix in ((moegate, ""), (catalog, "catalog."), (transformers, "integrations.transformers.")):
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value) and not name.startswith("__"):
                found[prefix + name] = value
                if inspect.isclass(value):
                    found |= {f"{prefix}{name}.{member}": each for member, each in _members(value)}
    return found


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Methods, properties and fields with a name for users, of this class and its bases in moegate.

    Without the members of `torch.nn.Module` other than `forward`, and without fields that the class's Args describe.
    """
    others = set(dir(nn.Module)) - {"forward"} if issubclass(cls, nn.Module) else set()
    told = set(re.findall(r"^    (\w+):", inspect.getdoc(cls) or "", re.MULTILINE))
    for base in cls.__mro__:
        if base.__module__.startswith("moegate"):
            for name in dict.fromkeys([*vars(base).get("__annotations__", ()), *vars(base)]):
                if not name.startswith("_") and name not in others | told:
                    yield name, getattr(base, name, None)


def fields_of(cls: type) -> dict[str, str]:
    """The annotated fields of a class with the text behind each in the source, "" where there is none."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, behind in itertools.pairwise([*tree.body, ast.Pass()]):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(behind, ast.Expr) and isinstance(behind.value, ast.Constant)
            found[field.target.id] = str(ast.literal_eval(behind.value)) if is_text else ""  # type: ignore[attr-defined]
    return found


def docstring_of(name: str) -> str:
    """The docstring of a public name, or of a field the text behind it."""
    owner, _, member = name.rpartition(".")
    fields = fields_of(public_objects()[owner]) if owner in public_objects() else {}
    return inspect.cleandoc(fields[member]) if member in fields else inspect.getdoc(public_objects()[name]) or ""


def docstring_blocks() -> list[Block]:
    """The fenced blocks in the docstrings of public names; lines are counted in the docstring."""
    found = []
    for name in public_objects():
        blocks = blocks_of(docstring_of(name), ROOT / f"docstring of {name}")
        found += [block for block in blocks if block.language]  # without a language: indented entries of Args
    return found


def all_blocks(pages: Iterable[Path] = PAGES) -> list[Block]:
    """The blocks of the pages and of the docstrings, in order."""
    return [block for page in pages for block in blocks_of(page.read_text(encoding="utf-8"), page)] + docstring_blocks()


def _line(token: Token) -> int:
    assert token.map is not None
    return token.map[0] + 1


def _inline(text: str) -> Iterator[tuple[int, Token]]:
    line = 0
    for token in _PARSER.parse(text):
        line = line if token.map is None else _line(token)
        for child in token.children or ():
            yield line, child
