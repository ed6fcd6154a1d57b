"""The compiler and its disk cache: whatever is wrong with the cache costs a compilation, never a run."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moegate.backends.cuda import jit
from moegate.backends.cuda.jit import cache, compiler, module
from moegate.backends.cuda.tiling import (
    COLUMNS_OF_STEP,
    MAX_GEMM_TOKENS,
    TOKENS_OF_TILE,
    Chip,
    Cut,
    bytes_of_block,
    cut_tokens,
    parts,
    plan_gemm,
    shared_bytes,
    shares_of_product,
)

pytestmark = pytest.mark.cpu
needs_nvrtc = pytest.mark.skipif(jit.missing_compiler() is not None, reason=str(jit.missing_compiler()))

MANY_BYTES = 100 * 1024  # more shared memory than a block has without asking
TEXT = 'extern "C" __global__ void nothing() {}\n'
ARCH = "sm_90a"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
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

    # root may write anywhere, so that the mode of a folder alone would not do
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
        "import hashlib; from moegate.backends.cuda import jit; "
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


DTYPES = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


@given(
    steps_of_lane=st.integers(1, 4096),
    rows=st.integers(1, 1024),
    hidden=DTYPES,
    weight=DTYPES,
    norm=st.booleans(),
    chip=st.builds(Chip, st.integers(1, 200), st.booleans(), st.sampled_from([99 * 1024, 163 * 1024, 227 * 1024])),
)
def test_plans(steps_of_lane: int, rows: int, hidden: torch.dtype, weight: torch.dtype, norm: bool, chip: Chip) -> None:
    """Every column has an owner, in blocks and clusters that a chip can hold."""
    plan = plan_gemm(8 * steps_of_lane, rows, parts(hidden, weight, norm)[:2], chip)
    assert plan.split * plan.warps * plan.steps * COLUMNS_OF_STEP >= 8 * steps_of_lane
    assert plan.split in (1, 2, 4, 8)
    assert chip.has_clusters or plan.split == 1
    assert 32 <= 32 * plan.warps <= 1024
    assert all(1 <= ahead <= plan.steps for ahead in plan.ahead.values())
    assert all(shared_bytes(plan.split, plan.warps, tiles) <= chip.shared_bytes for tiles in plan.ahead)
    assert min(plan.ahead) == 1
    assert list(plan.ahead) == sorted(plan.ahead)


@given(
    hidden_size=st.integers(1, 2048).map(lambda pieces: 8 * pieces),
    rows=st.integers(1, 1024),
    weight=DTYPES,
    chip=st.builds(Chip, st.integers(1, 200), st.booleans(), st.sampled_from([99 * 1024, 163 * 1024, 227 * 1024])),
    tokens=st.integers(1, MAX_GEMM_TOKENS),
)
def test_every_token_has_a_block(hidden_size: int, rows: int, weight: torch.dtype, chip: Chip, tokens: int) -> None:
    """Each once, in blocks that there are kernels for and that a chip can hold; all in one as long as one tile does."""
    plan = plan_gemm(hidden_size, rows, parts(torch.bfloat16, weight, False)[:2], chip)
    cut = cut_tokens(tokens, plan, chip)
    assert cut.tiles in plan.ahead
    of_block = TOKENS_OF_TILE * cut.tiles
    assert of_block * (cut.groups - 1) < tokens <= of_block * cut.groups
    assert bytes_of_block(cut.tiles, plan, chip, is_alone=cut.is_alone) <= chip.shared_bytes
    assert tokens > TOKENS_OF_TILE or cut == Cut(1, 1, False)


H100 = Chip(132, True, 227 << 10)


@pytest.mark.parametrize(
    ("hidden_size", "rows", "tokens", "cut"),
    [
        (7168, 256, 16, Cut(2, 1, True)),
        (7168, 256, 64, Cut(8, 1, True)),
        (4096, 8, 64, Cut(2, 4, True)),  # few rows: 32 blocks of 16 tokens instead of 8 of 64
        (5376, 64, 64, Cut(4, 2, True)),
        (2048, 512, 64, Cut(4, 2, True)),  # clusters of two
        (2880, 128, 128, Cut(2, 8, False)),  # light blocks side by side
        (7168, 256, 128, Cut(8, 2, True)),
    ],
)
def test_tokens_are_cut_as_was_fastest_on_an_h100(hidden_size: int, rows: int, tokens: int, cut: Cut) -> None:
    assert cut_tokens(tokens, plan_gemm(hidden_size, rows, (1, 1), H100), H100) == cut


@pytest.mark.parametrize(
    ("tokens", "columns", "hidden_size", "shares"),
    [
        (128, 256, 7168, 8),
        (512, 256, 7168, 4),
        (1024, 256, 7168, 2),
        (4096, 256, 7168, 1),
        (512, 128, 2880, 5),  # 6, 7 and 8 would cut steps of 64 apart
        (256, 768, 3072, 4),
        (65, 8, 448, 1),  # two would be shorter than 256
        (65, 8, 1000, 1),
    ],
)
def test_products_are_cut_as_was_fastest_on_an_h100(tokens: int, columns: int, hidden_size: int, shares: int) -> None:
    assert shares_of_product(tokens, columns, hidden_size, H100.num_sms) == shares


def test_a_chip_with_little_shared_memory_gets_smaller_blocks() -> None:
    large, small = (plan_gemm(8192, 256, (1, 1), Chip(132, True, kib << 10)) for kib in (227, 99))
    assert max(large.ahead) == 8
    assert max(small.ahead) == 4
    assert (small.split, small.warps, small.steps) == (large.split, large.warps, large.steps)


@needs_nvrtc  # comes with the driver's binding
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
    )
    monkeypatch.setattr(module, "_driver", lambda: takes_all)
    of_second = module.Module(b"", ARCH, 1)
    of_second.kernel("many", "P", 32, shared_bytes=MANY_BYTES)
    of_second.kernel("many", "P", 32, shared_bytes=MANY_BYTES - 1024)  # takes nothing away from the first
    of_second.kernel("few", "P", 32, shared_bytes=512, least_shared=True)
    assert asked == [
        ("CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES", MANY_BYTES, 1),
        ("CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT", 0, 1),
    ]
