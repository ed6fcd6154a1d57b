"""A bad cache folder never stops a gate: there is one warning, and the gate works."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from machines import forget

from moegate.cache_folder import cache_folder
from moegate.choice import tables
from moegate.cuda.jit import cache
from moegate.machine import Machine

HERE = Machine("GPU X", (9, 0), 132, 3352.3, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    forget()
    yield
    forget()


def _denied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Imitates the home of another user with mode 700, since root, who may run these tests, can enter every folder."""

    def refuse(self: Path, *arguments: object, **named: object) -> NoReturn:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)


def _home_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")


def _cache_is_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _cache_is_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Older releases of platformdirs return a relative XDG_CACHE_HOME; newer releases ignore it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moegate.cache_folder.user_cache_path", lambda name: Path("here") / name)


def _links_in_a_ring(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "home").symlink_to(tmp_path / "home")


def _no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No HOME, and a user id without an entry in the list of users: "~" is not expanded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("HOME")


def keep_two() -> None:
    for key in ("one", "two"):
        assert cache.read(key) is None
        cache.write(key, b"code")


SPOIL: list[Callable[[pytest.MonkeyPatch, Path], None]] = [
    _denied,
    _home_is_a_file,
    _cache_is_a_file,
    _cache_is_relative,
    _links_in_a_ring,
    _no_home,
]


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda spoil: spoil.__name__)
def test_no_folder_stops_a_plan(
    spoil: Callable[[pytest.MonkeyPatch, Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        spoil(patched, tmp_path)
        with pytest.warns(RuntimeWarning, match="cost table of this GPU .* it is ignored") as seen:
            found = tables.table_for(HERE)
    assert len(seen) == 1
    assert found.table is not None
    assert not found.table.is_own


@pytest.mark.parametrize("spoil", SPOIL, ids=lambda spoil: spoil.__name__)
def test_no_folder_stops_a_kernel(
    spoil: Callable[[pytest.MonkeyPatch, Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with monkeypatch.context() as patched:
        spoil(patched, tmp_path)
        with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels") as seen:
            keep_two()
    assert len(seen) == 1
    assert not list(tmp_path.rglob("*kernels*"))  # neither in a folder named "~" nor in the working folder


def test_a_dangling_link_is_a_folder_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "home").symlink_to(tmp_path / "nowhere")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tables.table_for(HERE).table is not None
    with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels"):
        cache.write("one", b"code")


def test_a_full_disk_warns_once_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(RuntimeWarning, match="No space left on device") as seen:
        keep_two()
    assert len(seen) == 1
    assert list((cache_folder() / "kernels").iterdir()) == []


def test_a_read_only_folder_warns_once_for_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's messages have the names of the new files, which differ, and still count as one warning."""

    def read_only(path: object, *arguments: object, **named: object) -> NoReturn:
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("tempfile._os.open", read_only)
    with pytest.warns(RuntimeWarning, match="Read-only file system") as seen:
        keep_two()
    assert len(seen) == 1
