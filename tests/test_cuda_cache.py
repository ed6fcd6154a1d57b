"""The compiler and its disk cache: a bad cache costs a compilation, and never stops a run."""

from __future__ import annotations

import ctypes
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from moegate.cuda import jit
from moegate.cuda.jit import cache, compiler, module

pytestmark = pytest.mark.cpu
needs_nvrtc = pytest.mark.skipif(jit.missing_compiler() is not None, reason=str(jit.missing_compiler()))

MANY_BYTES = 100 * 1024  # more shared memory than a kernel may use without an attribute
TEXT = 'extern "C" __global__ void nothing() {}\n'
ARCH = "sm_90a"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tmp_path in cache.folder().parents
    return cache.folder()


@pytest.fixture
def fresh_reason() -> Iterator[None]:
    for known in (compiler.missing_compiler, compiler._version):
        known.cache_clear()
    yield
    for known in (compiler.missing_compiler, compiler._version):
        known.cache_clear()


def refuse(*arguments: object) -> NoReturn:
    raise AssertionError("compiled, although the disk has it")


def entry_of(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


@needs_nvrtc
def test_the_second_call_reads_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = jit.compile_binary(TEXT, ARCH)
    assert "nothing" in first.log
    assert entry_of(folder).name == compiler._key(TEXT, ARCH)
    monkeypatch.setattr(compiler, "_compile", refuse)
    assert jit.compile_binary(TEXT, ARCH).code == first.code


@needs_nvrtc
@pytest.mark.parametrize("damage", ["empty", "truncated", "only a digest", "flipped", "longer"])
def test_a_damaged_entry_is_replaced(folder: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = jit.compile_binary(TEXT, ARCH).code
    entry = entry_of(folder)
    whole = entry.read_bytes()
    flipped = bytes([*whole[:100], whole[100] ^ 1, *whole[101:]])
    entry.write_bytes(
        {
            "empty": b"",
            "truncated": whole[:-1],
            "only a digest": whole[:32],
            "flipped": flipped,
            "longer": whole + b"\0",
        }[damage]
    )
    assert jit.compile_binary(TEXT, ARCH).code == expected
    assert entry_of(folder).read_bytes() == whole
    monkeypatch.setattr(compiler, "_compile", refuse)
    assert jit.compile_binary(TEXT, ARCH).code == expected


@needs_nvrtc
def test_an_impossible_folder_warns_once(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file, where a folder should be")
    with pytest.warns(RuntimeWarning, match="cannot keep compiled kernels .* XDG_CACHE_HOME"):
        first = jit.compile_binary(TEXT, ARCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.compile_binary(TEXT, ARCH).code == first.code


@needs_nvrtc
def test_a_folder_without_the_right_to_write_warns_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: object, **named: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    # patched, since root may write into a folder of any mode
    monkeypatch.setattr("tempfile.NamedTemporaryFile", denied)
    with pytest.warns(RuntimeWarning, match="Permission denied"):
        first = jit.compile_binary(TEXT, ARCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.compile_binary(TEXT, ARCH).code == first.code
    assert list(folder.iterdir()) == []


@needs_nvrtc
def test_a_failed_replacement_leaves_no_file_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert jit.compile_binary(TEXT, ARCH).code
    assert list(folder.iterdir()) == []


@needs_nvrtc
def test_the_key_names_all_that_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = dict(compiler.headers())
    keys = [compiler._key(TEXT, ARCH), compiler._key(TEXT, "sm_80"), compiler._key(TEXT + "\n", ARCH)]
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "headers", lambda: {**texts, "device.cuh": texts["device.cuh"] + "\n"})
        keys.append(compiler._key(TEXT, ARCH))
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_version", lambda: (99, 9))
        keys.append(compiler._key(TEXT, ARCH))
    assert len(set(keys)) == len(keys)
    assert compiler._key(TEXT, ARCH) == keys[0]


@needs_nvrtc
def test_processes_at_once_all_get_the_same(folder: Path) -> None:
    code = (
        "import hashlib; from moegate.cuda import jit; "
        f"print(hashlib.sha256(jit.compile_binary({TEXT!r}, {ARCH!r}).code).hexdigest())"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    outputs = [process.communicate(timeout=240) for process in started]
    assert [process.returncode for process in started] == [0] * 8, outputs
    assert len({digest for digest, _ in outputs}) == 1
    assert cache.read(entry_of(folder).name) is not None


@pytest.mark.usefixtures("fresh_reason")
def test_without_nvrtc_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError("No module named 'cuda'")

    monkeypatch.setattr(compiler, "_nvrtc", missing)
    reason = jit.missing_compiler()
    assert reason is not None
    assert "No module named 'cuda'" in reason
    assert "moegate[cu13]" in reason
    with pytest.raises(RuntimeError, match=r"moegate\[cu13\]"):
        jit.compile_binary(TEXT, ARCH)


@needs_nvrtc
def test_a_text_that_does_not_compile_says_why(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r'sm_90a:\n(.|\n)*moegate\.cu\(1\): error: .*"nonsense" is undefined'):
        jit.compile_binary('extern "C" __global__ void wrong() { nonsense; }', ARCH)
    assert not folder.exists(), "a failure was kept"


def test_importing_moegate_imports_no_bindings() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import moegate; moegate.Gate, moegate.route; "
        "gate = moegate.Gate(moegate.RouterSpec(8, 4, 2), torch.zeros(4, 8)); gate(torch.zeros(1, 8)); "
        "new = {name for name in set(sys.modules) - before if name.startswith('cuda.bindings')}; "
        "assert not new, new; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


@needs_nvrtc  # the extra with NVRTC also has the driver's binding
def test_a_kernel_asks_its_own_gpu_for_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = import_module("cuda.bindings.driver")
    asked: list[tuple[str, int, int]] = []

    def set_attribute(attribute: Any, value: int, _kernel: Any, index: int) -> tuple[Any]:
        asked.append((attribute.name, value, index))
        return (driver.CUresult.CUDA_SUCCESS,)

    takes_all = SimpleNamespace(
        CUfunction_attribute=driver.CUfunction_attribute,
        CUfunction=int,
        cuLibraryLoadData=lambda *_: (driver.CUresult.CUDA_SUCCESS, 7),
        cuLibraryGetKernel=lambda *_: (driver.CUresult.CUDA_SUCCESS, 7),
        cuKernelSetAttribute=set_attribute,
        cuLaunchKernelEx=None,
    )
    monkeypatch.setattr(module, "_driver", lambda: takes_all)
    of_second = module.Module(b"", ARCH, 1)
    of_second.kernel("many", "P", 32, shared_bytes=MANY_BYTES)
    of_second.kernel("many", "P", 32, shared_bytes=MANY_BYTES - 1024)  # does not lower the first kernel's limit
    of_second.kernel("few", "P", 32, shared_bytes=512, least_shared=True)
    assert asked == [
        ("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", MANY_BYTES, 1),
        ("CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT", 0, 1),
    ]


@needs_nvrtc
def test_a_launch_hands_the_driver_its_arguments_grid_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = import_module("cuda.bindings.driver")
    launched: list[tuple[Any, ...]] = []

    def launch(config: Any, function: int, parameters: int, _extra: int) -> tuple[Any]:
        (place,) = (ctypes.c_size_t * 1).from_address(parameters)
        arguments = struct.unpack("=Qi", ctypes.string_at(place, 12))
        launched.append(
            (function, config.gridDimX, config.gridDimY, int(config.hStream), config.sharedMemBytes, arguments)
        )
        return (driver.CUresult.CUDA_SUCCESS,)

    names = ("CUlaunchConfig", "CUlaunchAttribute", "CUlaunchAttributeID")
    fake = SimpleNamespace(cuLaunchKernelEx=launch, **{name: getattr(driver, name) for name in names})
    monkeypatch.setattr(module, "_driver", lambda: fake)
    kernel = module.Kernel(5, "=Qi", 64, cluster=4, shared_bytes=512, pdl=True)
    kernel.launch((3, 2), 7, 2**40 + 1, -9)
    kernel.launch((3, 2), 7, 2, 8)
    kernel.launch((1, 2), 9, 2, 8)
    assert launched == [
        (5, 3, 2, 7, 512, (2**40 + 1, -9)),
        (5, 3, 2, 7, 512, (2, 8)),
        (5, 1, 2, 9, 512, (2, 8)),
    ]
