"""JSON files of others: every fault of a file is one error that names the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import refused

from moegate.choice import tables
from moegate.json_file import read_json

BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "a folder": (lambda path: path.mkdir(), "Is a directory"),
    "empty": (lambda path: path.write_text(""), "not JSON"),
    "cut": (lambda path: path.write_text('{"a": 1'), "not JSON"),
    "lists": (lambda path: path.write_text("[" * 100_000), "nested too deeply"),
    "objects": (lambda path: path.write_text('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deeply"),
    "latin-1": (lambda path: path.write_bytes(b'{"a": "\xe9"}'), "not UTF-8"),
    "endless number": (lambda path: path.write_text("9" * 10_000), "not JSON"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_fault_is_named(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    spoil, reason = BROKEN[name]
    spoil(path)
    with pytest.raises(ValueError, match=reason) as caught:
        read_json(path, "the file")
    assert str(caught.value).startswith(f"the file {path} cannot be used: ")
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    with pytest.raises(ValueError, match=reason):
        tables.read(path)


@pytest.mark.parametrize("name", BROKEN)
def test_bench_names_a_broken_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    spoil, reason = BROKEN[name]
    spoil(path)
    message = refused("bench", "--render", tmp_path)
    assert str(path) in message
    assert reason in message


def test_what_is_right_is_read(tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text('{"µ": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "file.json", "the file") == {"µ": [1, None]}
