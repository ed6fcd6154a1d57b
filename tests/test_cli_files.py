"""The files that the command line writes, and its errors where it cannot write."""

from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from command_line import refused, run
from safetensors.torch import load_file, save_file

from moegate.choice import tables
from moegate.cli import check
from moegate.measure.record import Record
from moegate.whole_file import replacing

ROUTE = ("route", "mixtral-8x7b", "--device", "cpu", "--tokens", 2)
DATA = Path(__file__).parent / "data"


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))


# Device 1, 7 is the same as /dev/full; the tests must not risk replacing /dev/full itself.
NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "device": (lambda path: os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 7)), "a device"),
    "FIFO": (os.mkfifo, "a pipe"),
    "socket": (_socket, "a socket"),
    "folder": (os.mkdir, "a folder"),
}


def make(kind: str, path: Path) -> str:
    create, words = NO_FILES[kind]
    try:
        create(path)
    except PermissionError:
        pytest.skip("this user may not make devices")
    return words


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("kind", NO_FILES)
def test_route_refuses_what_is_no_file(kind: str, linked: bool, tmp_path: Path) -> None:
    there = tmp_path / "x"
    words = make(kind, there)
    before = there.stat()
    out = tmp_path / "link" if linked else there
    if linked:
        out.symlink_to(there)
    assert f"--out: {out} is {words}; allowed: a file" in refused(*ROUTE, "--out", out)
    assert (there.stat().st_ino, there.stat().st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize("kind", NO_FILES)
def test_render_refuses_what_is_no_file(kind: str, tmp_path: Path) -> None:
    shutil.copy(DATA / "bench.json", tmp_path)
    words = make(kind, tmp_path / "bench.html")
    assert words in refused("bench", "--render", tmp_path)


def test_records_of_an_earlier_moegate_are_refused(tmp_path: Path) -> None:
    """Their contestants have other names, so that a resumed record would mix the two."""
    old = (DATA / "bench.json").read_text("utf-8").replace('"contestants":', '"candidates":')
    (tmp_path / "bench.json").write_text(old, "utf-8")
    words = f"{tmp_path / 'bench.json'} was written by an earlier moegate, which had other names for what it timed"
    assert words in refused("bench", "--render", tmp_path)
    with pytest.raises(ValueError, match="an earlier moegate"):
        Record(tmp_path, "bench", {"id": "0"})


@pytest.mark.parametrize("is_there", [True, False], ids=["a file", "dangling"])
def test_a_link_stays_and_its_target_is_written(is_there: bool, tmp_path: Path) -> None:
    target, link = tmp_path / "far" / "target", tmp_path / "link"
    target.parent.mkdir()
    if is_there:
        target.write_text("before")
    link.symlink_to(target)
    assert run(*ROUTE, "--out", link).exit_code == 0
    assert link.is_symlink()
    assert load_file(target)["topk_ids"].shape == (2, 2)
    assert sorted(path.name for path in (*tmp_path.iterdir(), *target.parent.iterdir())) == ["far", "link", "target"]


def test_a_link_into_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "no" / "target")
    assert f"no folder {tmp_path / 'no'}" in refused(*ROUTE, "--out", tmp_path / "link")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes(umask: int, mode: int, tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("before")
    old.chmod(0o640)
    before = os.umask(umask)
    try:
        for out in (new, old):
            assert run(*ROUTE, "--out", out).exit_code == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(new.stat().st_mode) == mode
    assert stat.S_IMODE(old.stat().st_mode) == 0o640


def test_a_full_disk_is_said_and_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    out = tmp_path / "out"
    out.write_text("before")
    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert f"--out: cannot write {out}: " in refused(*ROUTE, "--out", out)
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("before")

    def write_half() -> None:
        with replacing(out) as new:
            new.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]


def test_the_file_of_hidden_states_is_not_overwritten_under_another_name(tmp_path: Path) -> None:
    hidden = tmp_path / "hidden"
    save_file({"x": torch.zeros(2, 4096)}, hidden)
    os.link(hidden, tmp_path / "same")
    asked = ("route", "mixtral-8x7b", "--device", "cpu", "--hidden", hidden, "--out", tmp_path / "same")
    assert "is the file of --hidden" in refused(*asked)


def test_a_cost_table_is_written_through_a_link(tmp_path: Path) -> None:
    shipped = next(iter(tables._shipped()))
    (tmp_path / "link").symlink_to(tmp_path / "table.json")
    tables.write(tmp_path / "link", tables.read(shipped))
    assert (tmp_path / "link").is_symlink()
    assert len(tables.read(tmp_path / "table.json").rows) == len(tables.read(shipped).rows)


# NaN


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_tokens_are_counted_and_left_out_of_the_load(value: float, tmp_path: Path) -> None:
    """Two of five tokens; infinities of both signs in a row give NaN logits, too."""
    hidden = torch.randn(5, 4096, generator=torch.Generator().manual_seed(0))
    hidden[1], hidden[3] = value, value
    file = tmp_path / "hidden"
    save_file({"x": hidden}, file)
    asked = ("route", "mixtral-8x7b", "--device", "cpu", "--hidden", file)
    facts = json.loads(run(*asked, "--json").stdout)
    assert facts["nan_tokens"] == 2
    assert sum(facts["load"]["experts"]) == 3 * 2
    result = run(*asked)
    assert result.exit_code == 0
    assert "2 of 5 tokens are NaN" in result.stdout


def test_only_nan(tmp_path: Path) -> None:
    save_file({"x": torch.full((32, 4096), torch.nan)}, tmp_path / "hidden")
    result = run("route", "mixtral-8x7b", "--device", "cpu", "--hidden", tmp_path / "hidden")
    assert "32 of 32 tokens are NaN" in result.stdout
    assert "max 0 tokens" in result.stdout
    assert "NaN" not in run(*ROUTE).stdout


# Consoles


def commands(tmp_path: Path) -> list[tuple[Any, ...]]:
    shutil.copy(DATA / "bench.json", tmp_path)
    return [
        ("models",),
        ("route", "longcat-flash", "--device", "cpu", "--tokens", 3),
        ("check",),
        ("explain", "deepseek-v3", "--device", "sm_90"),
        ("bench", "--render", tmp_path),
    ]


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_nothing_is_cut_off(columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "MODELS", ("qwen3-30b-a3b",))
    monkeypatch.setattr(check, "TOKENS", (1, 5))
    for command in commands(tmp_path):
        result = run(*command, columns=columns)
        assert result.exit_code == 0
        assert "…" not in result.stdout, command
        assert "Traceback" not in result.stderr


def test_times_and_verdicts_are_there_in_40_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ("explain", "deepseek-v3", "--device", "sm_90", "--tokens", "1,64,4096")
    printed = run(*asked, columns=40).stdout.split()
    for row in json.loads(run(*asked, "--json").stdout):
        for us in [row["expected_us"], *(entry["expected_us"] for entry in row["rejected"])]:
            assert us is None or f"{us:.2f}" in printed
    monkeypatch.setattr(check, "MODELS", ("qwen3-30b-a3b",))
    assert "torch on cpu, qwen3-30b-a3b: ok" in " ".join(run("check", columns=40).stdout.split())


def moegate(
    *arguments: object, stdout: Any = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "moegate", *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [("models",), ("models", "--json"), ("--help",), ("--version",)], ids=str)
def test_a_full_disk_behind_stdout_is_one_line(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = moegate(*arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"moegate: cannot write to standard output: No space left on device\n"


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = moegate("models", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_is_whole_in_every_encoding(encoding: str) -> None:
    done = moegate("models", "--json", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode(encoding)) == json.loads(run("models", "--json").stdout)


def test_a_poor_terminal_gets_no_traceback() -> None:
    for environment in ({"PYTHONIOENCODING": "ascii", "TERM": "dumb"}, {"NO_COLOR": "1", "LC_ALL": "C"}):
        done = moegate("explain", "deepseek-v3", "--device", "GB10", **environment)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"\x1b" not in done.stdout
