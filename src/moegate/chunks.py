"""Many rows on a CPU in chunks: the scratch memory of a routing does not grow with the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from moegate.plain import can_be_asked
from moegate.routing import Routing

# A chunk has as many rows as make so many numbers, 16 MB in float32. The selection makes about four numbers of each
# logit. A chunk has at least `_ROWS` rows, since smaller GEMMs take longer a row.
_NUMBERS = 1 << 22
_OF_LOGIT = 4
_ROWS = 512
# Fewer rows are selected by other operations, whose weights may differ in the last bit. So all rows of a call take one
# path.
_LEAST = 17
# The numbers of rows of one GEMM. oneDNN caches compiled code for up to 1024 numbers of rows, 0.6 to 0.8 MB each. These
# take 26 MB. A GEMM of another number of rows is put together from these.
_SIZES = (4096, 2048, 1024, 512, 384, 256, 192, 128, 96, *range(64, 24, -8), *range(24, 0, -1))
_IS_SIZE = frozenset(_SIZES)

_Result = TypeVar("_Result", Tensor, Routing)


def are_many(rows: Tensor) -> bool:
    """True for more rows than a chunk has at least, on a CPU; False for wrappers and traced tensors."""
    return rows.is_cpu and rows.shape[0] > _ROWS and can_be_asked(rows)


def in_chunks(num_rows: int, num_gate_rows: int, compute: Callable[[slice], _Result], *, copied: int = 0) -> _Result:
    """What `compute` returns for all rows, called chunk by chunk.

    `copied`: the numbers of a row that are copied before its logits are made: K where the GEMM is in another dtype.
    """
    at_once = max(1, _NUMBERS // max(copied, _OF_LOGIT * num_gate_rows) // _ROWS) * _ROWS
    whole: _Result | None = None
    for rows in _chunks(num_rows, at_once):
        part = compute(rows)
        if rows == slice(0, num_rows):
            return part
        if whole is None:
            whole = _empty(part, num_rows)
        for target, source in zip(_tensors(whole), _tensors(part), strict=True):
            target[rows] = source
    assert whole is not None
    return whole


def in_sizes(rows: Tensor, gemm: Callable[[Tensor], Tensor]) -> Tensor:
    """A GEMM of rows [M, K] put together of some with few different M, for oneDNN's cache."""
    num_rows = rows.shape[0]
    if num_rows in _IS_SIZE or num_rows == 0:
        return gemm(rows)
    return torch.cat([gemm(part) for part in rows.split(_sizes(num_rows))])


def _chunks(num_rows: int, at_once: int) -> Iterator[slice]:
    last = (num_rows - _LEAST) // at_once * at_once
    yield from (slice(start, start + at_once) for start in range(0, last, at_once))
    yield slice(last, num_rows)


def _tensors(result: Tensor | Routing) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if part is not None]


def _empty(part: _Result, num_rows: int) -> _Result:
    """Tensors like those of a chunk, for all rows."""
    if isinstance(part, Tensor):
        return part.new_empty((num_rows, *part.shape[1:]))
    return Routing(*(None if tensor is None else _empty(tensor, num_rows) for tensor in part))  # type: ignore[arg-type]


@lru_cache(maxsize=1024)
def _sizes(num_rows: int) -> tuple[int, ...]:
    """The fewest of `_SIZES` by always taking the largest that is left."""
    sizes = []
    for size in _SIZES:
        sizes += [size] * (num_rows // size)
        num_rows %= size
    return tuple(sizes)
