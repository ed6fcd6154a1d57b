"""CUDA C++ text to a cubin through NVRTC, which needs neither a GPU nor a host compiler nor headers."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib import import_module, resources
from typing import Any, NamedTuple

from moegate.cuda.jit import cache as disk
from moegate.cuda.jit.errors import checked

_EXTRA = "`pip install moegate[cu13]` (or [cu12], as torch.version.cuda says) brings it"
_FLAGS = ("--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v")


class Binary(NamedTuple):
    """A compiled text."""

    code: bytes
    """A cubin, or PTX where the architecture was `compute_XX`."""
    log: str
    """What the compiler said: registers and spills of each kernel."""


def compile_binary(source: str, arch: str) -> Binary:
    """Compiles CUDA C++ for an architecture, or takes the result of an earlier process from the disk.

    Args:
        source: May include the headers of `kernels/` by their names, and no others.
        arch: `sm_90a` makes a cubin, `compute_90` PTX that every later chip runs.

    Raises:
        RuntimeError: NVRTC is missing, or the text does not compile; the message has the compiler's.
    """
    reason = missing_compiler()
    if reason is not None:
        raise RuntimeError(reason)
    key = _key(source, arch)
    code = disk.read(key)
    if code is not None:
        return Binary(code, "")
    binary = _compile(source, arch)
    disk.write(key, binary.code)
    return binary


class KernelUse(NamedTuple):
    """What ptxas gave a kernel."""

    name: str
    registers: int
    """Of a thread."""
    memory_bytes: int
    """Stack frame, spill stores and spill loads of a thread."""


def kernel_uses(source: str, arch: str) -> list[KernelUse]:
    """Compiles CUDA C++, past the disk cache, for what each kernel uses; nothing, where `arch` makes PTX.

    Raises:
        RuntimeError: See `compile_binary`.
    """
    reports = re.split(r"Compiling entry function '(\w+)'", _compile(source, arch).log)[1:]
    return [_use(name, report) for name, report in zip(reports[::2], reports[1::2], strict=True)]


def _use(name: str, report: str) -> KernelUse:
    registers = re.search(r"Used (\d+) registers", report)
    memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers is not None, report
    assert memory is not None, report
    return KernelUse(name, int(registers[1]), sum(map(int, memory.groups())))


@cache
def missing_compiler() -> str | None:
    """None, or the reason why nothing can be compiled here."""
    try:
        _version()
    except (ImportError, OSError, RuntimeError) as error:
        return f"NVRTC cannot be used ({type(error).__name__}: {error}); {_EXTRA}"
    return None


@cache
def known_archs() -> frozenset[int]:
    """The chips that this NVRTC writes code for, such as 90 for compute capability 9.0; none, if there is no NVRTC."""
    if missing_compiler() is not None:
        return frozenset()
    return frozenset(checked(_nvrtc().nvrtcGetSupportedArchs))


@cache
def headers() -> dict[str, str]:
    """The texts of `kernels/`, by name: part of this package, and of every key."""
    folder = resources.files("moegate.cuda") / "kernels"
    return {file.name: file.read_text() for file in sorted(folder.iterdir(), key=lambda file: file.name)}


def _key(source: str, arch: str) -> str:
    """Names a binary by all that decides what is in it."""
    parts = [source, arch, *_FLAGS, repr(_version()), *(text for item in headers().items() for text in item)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _nvrtc() -> Any:
    # By name: the bindings are an optional dependency, and importing them loads a library.
    return import_module("cuda.bindings.nvrtc")


@cache
def _version() -> tuple[int, int]:
    error, major, minor = _nvrtc().nvrtcVersion()
    if error != 0:
        raise RuntimeError(f"nvrtcVersion: {error.name}")
    return major, minor


def _compile(source: str, arch: str) -> Binary:
    nvrtc = _nvrtc()
    names, texts = zip(*headers().items(), strict=True)
    program = checked(
        nvrtc.nvrtcCreateProgram,
        source.encode(),
        b"moegate.cu",
        len(names),
        [text.encode() for text in texts],
        [name.encode() for name in names],
    )
    try:
        options = [option.encode() for option in (f"--gpu-architecture={arch}", *_FLAGS)]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        log = _text(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode()
        if error != 0:
            raise RuntimeError(f"{error.name} for {arch}:\n{log}")
        if arch.startswith("compute"):
            return Binary(_text(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX), log)
        return Binary(_text(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log)
    finally:
        checked(nvrtc.nvrtcDestroyProgram, program)


def _text(program: Any, size_of: Any, fill: Any) -> bytes:
    data = bytes(checked(size_of, program))
    checked(fill, program, data)
    return data
