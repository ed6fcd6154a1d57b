"""Many rows on a CPU, in chunks, so that temporary memory does not grow with the number of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from moegate.plain import can_be_asked
from moegate.routing import Routing

# The temporaries of a chunk have about `_NUMBERS` numbers, 16 MB in float32; a selection makes `_OF_LOGIT` for each
# logit. A chunk has a multiple of `_ROWS` rows, since GEMMs of fewer rows are slower a row.
_NUMBERS = 1 << 22
_OF_LOGIT = 4
_ROWS = 512
# The last chunk has at least so many rows. Fewer rows are selected by other operations (selection/cpu_rows.py), whose
# weights may differ in the last bit, and all rows of a call must use the same operations.
_LEAST = 17
# Rows of one GEMM. oneDNN caches compiled code for up to 1024 numbers of rows that it has met, 0.6 to 0.8 MB each. The
# code for these sizes takes 26 MB. GEMMs of other sizes are composed of these.
_SIZES = (4096, 2048, 1024, 512, 384, 256, 192, 128, 96, *range(64, 24, -8), *range(24, 0, -1))
_IS_SIZE = frozenset(_SIZES)

_Result = TypeVar("_Result", Tensor, Routing)


def are_many(rows: Tensor) -> bool:
    """True for rows on a CPU that are many enough for chunks; False for wrappers and under a mode or a tracer."""
    return rows.is_cpu and rows.shape[0] > _ROWS and can_be_asked(rows)


def in_chunks(num_rows: int, num_gate_rows: int, compute: Callable[[slice], _Result], *, copied: int = 0) -> _Result:
    """Calls `compute` for the rows of each chunk; returns the results of all rows.

    `copied`: the numbers that `compute` makes of a row in front of its logits: K where the GEMM casts `hidden`, else 0.
    """
    at_once = max(1, _NUMBERS // max(copied, _OF_LOGIT * num_gate_rows) // _ROWS) * _ROWS
    whole: _Result | None = None
    for rows in _chunks(num_rows, at_once):
        chunk = compute(rows)
        if rows == slice(0, num_rows):
            return chunk
        if whole is None:
            whole = _empty_like(chunk, num_rows)
        for target, source in zip(_tensors(whole), _tensors(chunk), strict=True):
            target[rows] = source
    assert whole is not None
    return whole


def in_sizes(rows: Tensor, gemm: Callable[[Tensor], Tensor]) -> Tensor:
    """A GEMM of oneDNN for rows [M, K], composed so that oneDNN meets few different M."""
    num_rows = rows.shape[0]
    if num_rows in _IS_SIZE or num_rows == 0:
        return gemm(rows)
    return torch.cat([gemm(chunk) for chunk in rows.split(_sizes(num_rows))])


def _chunks(num_rows: int, at_once: int) -> Iterator[slice]:
    last = (num_rows - _LEAST) // at_once * at_once
    yield from (slice(start, start + at_once) for start in range(0, last, at_once))
    yield slice(last, num_rows)


def _tensors(result: Tensor | Routing) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [tensor for tensor in result if tensor is not None]


def _empty_like(chunk: _Result, num_rows: int) -> _Result:
    """Empty tensors like those of a chunk, for all rows."""
    if isinstance(chunk, Tensor):
        return chunk.new_empty((num_rows, *chunk.shape[1:]))
    tensors = (None if tensor is None else _empty_like(tensor, num_rows) for tensor in chunk)
    return Routing(*tensors)  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _sizes(num_rows: int) -> tuple[int, ...]:
    """Sizes of `_SIZES` that add up to `num_rows`, the largest first."""
    sizes = []
    for size in _SIZES:
        sizes += [size] * (num_rows // size)
        num_rows %= size
    return tuple(sizes)
