"""Stand-ins for what SGLang imports and a machine without a GPU lacks: modules whose every attribute is an empty class.

Nothing of them computes. A test that reached one of their functions would get no tensor back, and fail.
"""

from __future__ import annotations

import sys
from collections.abc import MutableSequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = ("sgl_kernel", "torchvision", "flashinfer")


class _EmptyType(type):
    """Classes whose attributes are such classes, too, as of `InterpolationMode.NEAREST`."""

    def __getattr__(cls, name: str) -> object:
        return _empty(name)


def _empty(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    return _EmptyType(name, (), {})


class _Stub(ModuleType):
    __path__: MutableSequence[str] = []  # noqa: RUF012
    __version__ = "0"  # older than any version that is asked for

    def __getattr__(self, name: str) -> object:
        return _empty(name)


class _Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        is_ours = fullname.partition(".")[0] in NAMES
        return ModuleSpec(fullname, self, is_package=True) if is_ours else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def install() -> None:
    """Lets the modules be imported, from now on in this process."""
    sys.meta_path.append(_Finder())
