"""The measurements of `moegate tune`: a cost table of this machine, which can be stopped and resumed at any row."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moegate import catalog
from moegate._version import __version__
from moegate.choice.tables import Row, Shape, Table, read, shape_of, write
from moegate.machine import Machine
from moegate.measure.names import NOT_FROZEN
from moegate.measure.record import describe_run
from moegate.problem import default_weight_dtype, problem_of
from moegate.spec import RouterSpec

# A sample of the catalog: gates of all sizes, every kind of selection, bfloat16 and float32 weights, an input norm.
MODELS = (
    "deepseek-v3",
    "kimi-k2",
    "kimi-k3",
    "glm-5",
    "deepseek-v4-flash",
    "llama-4-maverick",
    "qwen3.5-122b-a10b",
    "glm-4.5-air",
    "qwen3-30b-a3b",
    "qwen3-next-80b-a3b",
    "gpt-oss-120b",
    "mixtral-8x7b",
    "minimax-m2",
    "minimax-m3",
    "ernie-4.5-21b-a3b",
    "grok-1",
    "longcat-flash",
    "unlimited-ocr",
    "gemma-4-26b-a4b",
)
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
WAY = "trigger"
_SAME = ("moegate", "moegate_commit", "torch", "cuda", "flashinfer", "driver")

Case = tuple[str, int]
"""A model and a number of tokens."""
Measure = Callable[[RouterSpec, int], "dict[str, dict[str, Any]]"]
"""A spec and a number of tokens -> the result of `Session.measure`."""


def made_by(command: str) -> dict[str, Any]:
    """The provenance that a table states: date, command, versions."""
    run = describe_run(command)
    names = ("date", "command", "moegate_commit", "torch", "cuda", "flashinfer", "driver")
    return {**{name: run.get(name) for name in names}, "moegate": __version__}


class Tuning:
    """An unfinished cost table, stored in `FILE.partial` until every case has been measured.

    Args:
        path: The file of the finished table.
        gpu: The machine that is measured.
        made: See `made_by`.
        more: Models to measure in addition to `MODELS`, by name.

    Raises:
        ValueError: The unfinished table of an earlier run cannot be used; the message has its path.
    """

    def __init__(self, path: Path, gpu: Machine, made: dict[str, Any], more: Mapping[str, RouterSpec] = {}) -> None:
        specs = {model: catalog.get_spec(model) for model in MODELS}
        self._specs = {**{name: spec for name, spec in more.items() if spec not in specs.values()}, **specs}
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self._table = Table(gpu, made, ())
        if self.partial.exists():
            before = read(self.partial)
            different = [name for name in _SAME if before.made[name] != made[name]]
            if different or before.gpu.name != gpu.name:
                what = ", ".join(different) or "GPU"
                raise ValueError(f"the unfinished table {self.partial} was begun with another {what}; remove it")
            self._table = replace(self._table, rows=before.rows)

    def cases(self) -> list[Case]:
        """All cases of the finished table, ordered by model."""
        return [(model, tokens) for model in self._specs for tokens in TOKENS]

    def missing(self) -> list[Case]:
        """The cases that are not measured yet."""
        done = {(row.model, row.tokens) for row in self._table.rows}
        return [case for case in self.cases() if case not in done]

    def run(self, measure: Measure) -> Iterator[Row]:
        """Measures the missing cases. Yields each row after it is on the disk; the last row finishes the table."""
        for model, tokens in self.missing():
            spec = self._specs[model]
            shape = shape_of(problem_of(self._table.gpu, spec, default_weight_dtype(spec)))
            row = _row(model, shape, tokens, measure(spec, tokens))
            self._table = replace(self._table, rows=(*self._table.rows, row))
            write(self.partial, self._table)
            if not self.missing():
                os.replace(self.partial, self.path)
            yield row


def _row(model: str, shape: Shape, tokens: int, found: dict[str, dict[str, Any]]) -> Row:
    own = {key: entry for key, entry in found.items() if ":" in key}
    times = {key: round(entry["us"], 3) for key, entry in own.items() if entry.get("us", 0) > 0}
    frozen = {key: us for key, us in times.items() if not key.endswith(NOT_FROZEN)}
    not_frozen = {key.removesuffix(NOT_FROZEN): us for key, us in times.items() if key.endswith(NOT_FROZEN)}
    left_out = {key: entry.get("absent") or "its result was wrong" for key, entry in own.items() if key not in times}
    return Row(model, shape, tokens, frozen, left_out, not_frozen)
