"""Writes the API reference as HTML: `python tools/api_reference.py [FOLDER]`; `make docs` writes it to build/docs.

pdoc renders the docstrings of the public names, and the help of the command line, which Typer writes as Markdown.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path
from typing import Any

import pdoc.doc
import pdoc.render
from torch import nn

import moegate
import moegate.catalog
import moegate.integrations.transformers

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "docs"


def modules() -> dict[str, pdoc.doc.Module]:
    """The pages, by the name of their module, with the public names that each shows."""
    for name in moegate.__all__:
        getattr(moegate, name)  # names that need torch are imported at the first use
    shown, catalog, commands = pdoc.doc.Module(moegate), pdoc.doc.Module(moegate.catalog), _command_line()
    in_transformers = pdoc.doc.Module(moegate.integrations.transformers)
    in_transformers.submodules = []
    shown.submodules = [catalog, in_transformers, commands]
    # The class that `Gate.explain` returns is no name of `moegate`, but belongs into the reference.
    explanation = typing.get_type_hints(moegate.Gate.explain)["return"]
    place = explanation.__module__, explanation.__qualname__
    shown.members[place[1]] = pdoc.doc.Class(moegate.__name__, place[1], explanation, place)
    for page in (shown, catalog, in_transformers):
        for member in page.members.values():
            if isinstance(member, pdoc.doc.Class):
                member.members = public_members(member)
                member.own_members, member.inherited_members = list(member.members.values()), {}
                member.bases = [base for base in member.bases if base[0].partition(".")[0] != "moegate"]
    return {page.modulename: page for page in (shown, catalog, in_transformers, commands)}


def public_members(cls: pdoc.doc.Class) -> dict[str, pdoc.doc.Doc[Any]]:
    """The members of a class for users, including those of moegate's base classes.

    Left out: members that `torch.nn.Module` has too, except `forward`; fields that the Args of the class describe; the
    constructor of a named tuple, whose arguments are the fields.
    """
    told = sections(cls.docstring).get("Args", {})
    left_out = set(dir(nn.Module)) - {"__init__", "forward"} if issubclass(cls.obj, nn.Module) else set()
    if issubclass(cls.obj, tuple):
        left_out.add("__init__")
    found = {
        name: member
        for name, member in cls.members.items()
        if member.taken_from[0].partition(".")[0] == "moegate"
        and (not name.startswith("_") or name == "__init__")
        and name not in left_out
        and (member.docstring or not isinstance(member, pdoc.doc.Variable) or name not in told)
    }
    if "__init__" in found:
        found["__init__"].docstring = ""  # this one is a base class's; the class's own docstring has the Args
    return found


def sections(docstring: str) -> dict[str, dict[str, str]]:
    """The entries of a docstring's sections: {"Args": {"hidden": "[M, K] ..."}, ...}; of Returns, one named ""."""
    found: dict[str, dict[str, str]] = {}
    for title, text in re.findall(r"^(Args|Returns|Raises):\n((?:\n|[ \t]+.+(?:\n|$))+)", docstring, re.MULTILINE):
        body = textwrap.dedent(text).strip()
        if title == "Returns":
            found[title] = {"": body}
            continue
        found[title] = {}
        for entry in re.split(r"\n(?! )", body):
            names, _, told = entry.partition(":")
            found[title] |= {name.strip(): told.strip() for name in names.split(",")}
    return found


def _command_line() -> pdoc.doc.Module:
    """The page of the command line: commands and options."""
    command = [sys.executable, "-m", "typer", "moegate.cli", "utils", "docs", "--name", "moegate"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text.partition("\n")[2])  # a list of truncated sentences
    page = pdoc.doc.Module(types.ModuleType("moegate.cli"))
    page.docstring, page.source = text.lstrip(), ""
    page.members, page.submodules = {}, []
    return page


def write(folder: Path) -> None:
    """Writes the pages."""
    pages = modules()
    pdoc.render.configure(docformat="google", footer_text=f"moegate {moegate.__version__}")
    for name, page in pages.items():
        path = folder / f"{name.replace('.', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pdoc.render.html_module(page, pages), encoding="utf-8")
    (folder / "index.html").write_text(pdoc.render.html_index(pages), encoding="utf-8")
    (folder / "search.js").write_text(pdoc.render.search_index(pages), encoding="utf-8")


def main() -> None:
    """Writes the pages into the folder given on the command line."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    write(folder)
    print(f"written: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
