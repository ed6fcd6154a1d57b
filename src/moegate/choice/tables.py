"""Cost tables: files of measured times, one a GPU, in the package and in the user's cache folder."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from moegate._version import __version__
from moegate.cache_folder import cache_folder
from moegate.cuda import jit
from moegate.json_file import read_json
from moegate.machine import Machine
from moegate.problem import Problem, short
from moegate.routing import FLOATS
from moegate.spec import RouterSpec
from moegate.warn import warn_once
from moegate.whole_file import replacing

SCHEMA = 1
_WEIGHT_DTYPES = [short(dtype) for dtype in FLOATS]
_INPUT_NORM = "input_norm"
# The fields of a spec that do not decide its kind. Every other field does.
_NO_KIND = {
    *("hidden_size", "num_experts", "top_k", "weight_dtype"),  # a `Shape` has them itself
    *("renormalize_eps", "renormalize_floor", "routed_scaling_factor"),  # mere factors
    *("logit_multiplier", "logit_softcapping"),
    "input_norm_eps",  # whether there is one is said in other words
}
_MADE = ("date", "command", "moegate", "moegate_commit", "torch", "cuda", "flashinfer", "driver")


class Shape(NamedTuple):
    """What decides the time of a routing, beside the number of tokens."""

    hidden_size: int
    gate_rows: int
    top_k: int
    weight_dtype: str
    router: str
    """The kind of selection; see `router_kind`."""

    @property
    def has_input_norm(self) -> bool:
        """The GEMM multiplies normed hidden states."""
        return _INPUT_NORM in self.router.split()


@dataclass(frozen=True)
class Row:
    """The times of one shape at one number of tokens."""

    model: str
    """A model of the catalog that has the shape, for people."""
    shape: Shape
    tokens: int
    us: dict[str, float]
    """By candidate, microseconds in a CUDA graph behind a predecessor, less the predecessor's."""
    left_out: dict[str, str]
    """By candidate, why there is no time: it cannot run, or its result was wrong."""
    us_not_frozen: dict[str, float] = field(default_factory=dict)
    """The same as `us` for a gate that is not frozen, of the candidates whose kernels differ then."""

    def times(self, *, frozen: bool) -> dict[str, float]:
        """By candidate, the time to expect of such a gate; where none was measured, a frozen one's."""
        return self.us if frozen else {**self.us, **self.us_not_frozen}


@dataclass(frozen=True, eq=False)
class Table:
    """The measurements of one GPU."""

    gpu: Machine
    made: dict[str, Any]
    """When, by which command, with which versions and commit."""
    rows: tuple[Row, ...]
    is_own: bool = False
    """Made on this machine by `moegate tune`; the others are the package's."""


def router_kind(spec: RouterSpec) -> str:
    """What of a spec, beside its sizes, changes the work: the fields that are not at their default, less factors."""
    kinds = [part for part in dataclasses.fields(spec) if part.name not in _NO_KIND]
    found = [f"{part.name}={value}" for part in kinds if (value := getattr(spec, part.name)) != part.default]
    return " ".join(found + [_INPUT_NORM] * (spec.input_norm_eps is not None)) or "softmax"


def shape_of(problem: Problem) -> Shape:
    """The shape of a problem."""
    spec, dtype = problem.spec, short(problem.dtypes.weight)
    return Shape(spec.hidden_size, spec.num_gate_rows, spec.top_k, dtype, router_kind(spec))


def user_file(gpu: str) -> Path:
    """Where `moegate tune` keeps the table of a GPU.

    Raises:
        OSError: See `cache_folder`.
    """
    return cache_folder() / "costs" / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.json"


def write(path: Path, table: Table) -> None:
    """Writes the whole file at once, so that nobody ever sees a half."""
    gpu, capability = table.gpu, table.gpu.capability
    assert capability is not None
    content = {
        "schema": SCHEMA,
        "gpu": {
            "name": gpu.name,
            "capability": f"{capability[0]}.{capability[1]}",
            "num_sms": gpu.num_sms,
            "bandwidth": gpu.bandwidth,
        },
        "made": table.made,
        "rows": [{"model": row.model, **row.shape._asdict(), **_times(row)} for row in table.rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read(path: Any) -> Table:
    """The table of a file.

    Raises:
        ValueError: No JSON, another schema, or a field that is not what it should be; the message has the path.
    """
    content = read_json(path, "the cost table")
    try:
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            found = content.get("schema") if isinstance(content, dict) else type(content).__name__
            raise ValueError(f"schema {found!r}, where this version reads {SCHEMA}")
        gpu, made = content["gpu"], content["made"]
        major, minor = map(int, gpu["capability"].split("."))
        machine = Machine(str(gpu["name"]), (major, minor), gpu["num_sms"], gpu["bandwidth"])
        rows = tuple(_row(row) for row in content["rows"])
        absent = [name for name in _MADE if name not in made]
        if absent:
            raise ValueError(f"made has no {', '.join(absent)}")
        if not rows:
            raise ValueError("it has no rows")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"the cost table {path} cannot be used: {reason}") from None
    return Table(machine, dict(made), rows)


def stale(table: Table, machine: Machine) -> str | None:
    """None, or why a table in the user's folder says nothing about the machine as it is now."""
    if (table.gpu.name, table.gpu.num_sms) != (machine.name, machine.num_sms):
        return f"it is of {table.gpu.name} with {table.gpu.num_sms} multiprocessors"
    if table.made["moegate"] != __version__:
        return f"moegate {table.made['moegate']} made it, this is {__version__}"
    return None


class Found(NamedTuple):
    """The table for a machine, and what users are to know of it."""

    table: Table | None
    is_inferred: bool
    """It is of another GPU, the nearest relative."""
    problems: tuple[str, ...]
    """Tables that were ignored, and why."""


@cache
def table_for(machine: Machine) -> Found:
    """The user's table of this GPU, the package's, or the package's of the nearest relative, in this order."""
    problems: list[str] = []
    own = _checked(lambda: _own(machine), problems) if machine.device is not None else None
    if own is not None:
        return Found(own, False, ())
    shipped = [_checked(lambda file=file: read(file), problems) for file in _shipped()]  # type: ignore[misc]
    # Times of chips with PDL say nothing about chips without PDL, nor the other way round.
    usable = [table for table in shipped if table is not None and _has_pdl(table.gpu) == _has_pdl(machine)]
    for problem in problems:
        warn_once(f"{problem}; it is ignored")
    if machine.capability is None or not usable:
        return Found(None, False, tuple(problems))
    nearest = min(usable, key=lambda table: _distance(table.gpu, machine))
    return Found(nearest, nearest.gpu.name != machine.name, tuple(problems))


def _own(machine: Machine) -> Table | None:
    """The user's table; None: there is no such file.

    Raises:
        ValueError: It cannot be used.
    """
    try:
        path = user_file(machine.name)
        path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"the cost table of this GPU cannot be looked for ({error})") from None
    table = read(path)
    reason = stale(table, machine)
    if reason is not None:
        raise ValueError(f"the cost table {path} is stale: {reason}; `moegate tune` makes a new one")
    return Table(table.gpu, table.made, table.rows, is_own=True)


def _checked(load: Callable[[], Table | None], problems: list[str]) -> Table | None:
    try:
        return load()
    except ValueError as error:
        problems.append(str(error))
        return None


def _shipped() -> Iterable[Any]:
    folder = resources.files("moegate.choice") / "measured"
    return sorted((file for file in folder.iterdir() if file.name.endswith(".json")), key=lambda file: file.name)


def _has_pdl(machine: Machine) -> bool:
    return jit.has_clusters_and_pdl(f"sm_{machine.sm}")


def _distance(of: Machine, to: Machine) -> tuple[bool, int, int, float]:
    """How far a measured GPU is from another: by name, generation, version of it, and memory bandwidth."""
    assert of.capability is not None
    assert to.capability is not None
    known = of.bandwidth is not None and to.bandwidth is not None
    apart = abs((of.bandwidth or 0.0) - (to.bandwidth or 0.0)) if known else 0.0
    generations = zip(of.capability, to.capability, strict=True)
    major, minor = (abs(one - other) for one, other in generations)
    return of.name != to.name, major, minor, apart


def _row(row: dict[str, Any]) -> Row:
    shape = Shape(**{name: _typed(row, name) for name in Shape._fields})
    us, not_frozen = _times_of(row["us"]), _times_of(row.get("us_not_frozen", {}))
    if _typed(row, "tokens") < 1 or min(shape[:3]) < 1:
        raise ValueError(f"a row of {row['model']} has {row['tokens']} tokens and the sizes {list(shape[:3])}")
    return Row(str(row["model"]), shape, row["tokens"], us, dict(row["left_out"]), not_frozen)


def _times_of(times: dict[str, Any]) -> dict[str, float]:
    for name, value in times.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{value!r} for {name}, a time that is none")
    return {name: float(value) for name, value in times.items()}


def _typed(row: dict[str, Any], name: str) -> Any:
    expected = str if name in ("weight_dtype", "router") else int
    if type(row[name]) is not expected or (name == "weight_dtype" and row[name] not in _WEIGHT_DTYPES):
        raise ValueError(f"{name} = {row[name]!r}")
    return row[name]


def _times(row: Row) -> dict[str, Any]:
    return {"tokens": row.tokens, "us": row.us, "us_not_frozen": row.us_not_frozen, "left_out": row.left_out}
