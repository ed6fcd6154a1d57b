"""The packages that `make` installs beside the host's torch: torch's requirements are the host's, others are pinned."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

TOOL = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "environment.py"), run_name="environment")
NVRTC = "nvidia-cuda-nvrtc==13.0.88.*; (sys_platform == 'linux' or sys_platform == 'win32') and extra == 'nvrtc'"
NPP = "nvidia-npp==13.0.1.2.*; sys_platform == 'linux' and extra == 'npp'"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a folder with a torch that has these requirements."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def metadata(name: str, version: str, *requirements: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        folder.joinpath("METADATA").write_text(
            "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requirements)])
        )

    def make(version: str, cuda: str | None, *requirements: str) -> Any:
        folder = tmp_path / "torch"
        folder.mkdir()
        folder.joinpath("__init__.py").write_text("")
        folder.joinpath("version.py").write_text(f"from typing import Optional\ncuda: Optional[str] = {cuda!r}\n")
        spec = SimpleNamespace(origin=str(folder / "__init__.py"))
        monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == "torch" else None)
        metadata("torch", version, *requirements, 'optree>=0.13.0; extra == "optree"')
        metadata("cuda-toolkit", "13.0.2", NVRTC, NPP)
        metadata("jinja2", "3.1.6", "MarkupSafe>=2.0", 'babel; extra == "i18n"')
        return TOOL["Torch"](version, cuda, tmp_path)

    return make


def pins(text: str) -> dict[str, str]:
    return dict(line.split("==", 1) for line in text.splitlines() if "==" in line)


def test_without_a_torch_all_is_pinned() -> None:
    assert TOOL["constraints"](None) == TOOL["CONSTRAINTS"].read_text()
    assert TOOL["extras"](None).startswith("dev")


def test_what_the_hosts_torch_needs_is_the_hosts(host: Callable[..., Any]) -> None:
    torch = host(
        "2.11.0", "13.0", "setuptools<82", "jinja2", 'cuda-toolkit[cublas,nvrtc]==13.0.2; platform_system == "Linux"'
    )
    ours, all_of_them = pins(TOOL["constraints"](torch)), pins(TOOL["CONSTRAINTS"].read_text())
    assert ours["torch"] == "2.11.0"
    assert set(all_of_them) - set(ours) == {"setuptools", "Jinja2", "MarkupSafe", "nvidia-cuda-nvrtc"}
    assert ours["transformers"] == all_of_them["transformers"]


def test_a_torch_for_cuda_12_gets_its_bindings(host: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    torch = host("2.8.0", "12.8", "setuptools", "nvidia-cuda-nvrtc-cu12==12.8.93")
    assert TOOL["extras"](torch) == "dev,cu12"
    assert "cuda-bindings" not in pins(TOOL["constraints"](torch))


def test_the_hosts_torch_is_found(host: Callable[..., Any]) -> None:
    torch = host("2.10.0", "12.8")
    assert TOOL["host_torch"]() == torch


def test_an_old_torch_is_not_used(host: Callable[..., Any]) -> None:
    host("2.7.1", "12.6")
    assert TOOL["host_torch"]() is None
