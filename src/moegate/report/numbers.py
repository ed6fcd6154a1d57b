"""Numbers of a report, from the rows of bench.json: times, ratios, verdicts. A wrong result has no time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from moegate.measure.names import DEFAULT, DEFAULT_NOT_FROZEN, EAGER, FLOOR, NOT_FROZEN, PREDECESSOR, RecordRow

WAYS = {
    "trigger": "in a chain, behind a kernel that lets it start at once",
    "cold": "cold: other weights in each call, more than the cache holds",
    "hot": "hot: one weight",
}
ALLOWED = 1.05
"""The aim for a default plan: its time divided by that of the best candidate that keeps the contract, at most."""
_NOT_PEERS = (DEFAULT, DEFAULT_NOT_FROZEN, FLOOR, PREDECESSOR)


def columns(rows: list[RecordRow]) -> Iterator[tuple[str, str, list[RecordRow]]]:
    """(model, way, rows by ascending number of tokens), in the order of the file."""
    for model in models(rows):
        for way in WAYS:
            chosen = [row for row in rows if (row["model"], row["way"]) == (model, way)]
            if chosen:
                yield model, way, sorted(chosen, key=lambda row: int(row["tokens"]))


def models(rows: list[RecordRow]) -> list[str]:
    """The models, in the order of the file."""
    return list(dict.fromkeys(row["model"] for row in rows))


def time_of(row: RecordRow, name: str) -> float | None:
    """Microseconds of a contestant whose result is right."""
    found = row["contestants"].get(name, {})
    return float(found["us"]) if found.get("ok") and found.get("us", 0) > 0 else None


def is_peer(name: str) -> bool:
    """True for a contestant that is neither moegate nor a kernel of moegate nor a bound."""
    return name not in _NOT_PEERS and not name.startswith("cuda:")


def best_peer(row: RecordRow) -> tuple[str, float] | None:
    """The fastest peer with a right result, and its time."""
    times = {name: time for name in row["contestants"] if is_peer(name) and (time := time_of(row, name)) is not None}
    return min(times.items(), key=lambda item: item[1]) if times else None


def speed_up(row: RecordRow, name: str = DEFAULT) -> tuple[str, float] | None:
    """The best peer, and the peer's time divided by that of the default plan, or of another contestant."""
    best, ours = best_peer(row), time_of(row, name)
    return None if best is None or ours is None else (best[0], best[1] / ours)


def origins(runs: list[dict[str, Any]]) -> list[str]:
    """A line for each run: date, machine, versions, command."""
    return [
        f"{run['date'][:10]}: {run['gpu']} ({run.get('sm_count')} multiprocessors, driver {run.get('driver')}), "
        f"torch {run['torch']}, CUDA {run['cuda']}, FlashInfer {run['flashinfer']}, "
        f"Transformers {run['transformers']}, moegate {run['moegate_commit']}: {run['command']}"
        for run in runs
    ]


def share_of_floor(row: RecordRow) -> float | None:
    """The floor's time divided by that of the default plan."""
    floor, ours = time_of(row, FLOOR), time_of(row, DEFAULT)
    return None if floor is None or ours is None else floor / ours


def kept_times(row: RecordRow, *, frozen: bool = True) -> list[float]:
    """The times of the candidates that keep the contract; only those of the cuda backend depend on `frozen`."""
    names = [f"{name}{'' if frozen or not name.startswith('cuda:') else NOT_FROZEN}" for name in row["keeps_contract"]]
    return [time for name in names if (time := time_of(row, name)) is not None]


def plan_ratio(row: RecordRow, *, frozen: bool = True) -> float | None:
    """The time of the plan's choice divided by that of the best candidate that keeps the contract; None: not measured.

    Both are times of candidates, not of a gate: each candidate has a graph of its own. `timed_twice` compares the two.
    """
    times = kept_times(row, frozen=frozen)
    chosen = time_of(row, row["plan"] if frozen else row.get("plan_not_frozen", ""))
    return None if chosen is None or not times else chosen / min(times)


def timed_twice(row: RecordRow) -> float | None:
    """The gate's time divided by that of its plan's candidate: how far two graphs of the same kernels differ."""
    gate, chosen = time_of(row, DEFAULT), time_of(row, row["plan"])
    return None if gate is None or chosen is None else gate / chosen


def label(name: str) -> str:
    """A contestant's name as users see it."""
    backend, _, kernel = name.partition(":")
    if backend == "flashinfer":
        gemm, _, top_k = kernel.partition("+")
        gemm = {"cublas": "cuBLAS", "tinygemm_bf16": "FlashInfer tinygemm"}.get(gemm, "FlashInfer GEMM")
        return f"{gemm} + FlashInfer top-k" if top_k else f"{gemm} + our select"
    return {"torch": EAGER, "cuda": f"cuda {kernel}"}.get(backend, name)


def cell(found: dict[str, Any]) -> str:
    """The text of a table's cell: a time, "wrong", or nothing."""
    if found.get("ok") is False:
        return "wrong"
    return f"{found['us']:.2f}" if "us" in found else ""


def agreement(found: list[dict[str, Any]]) -> str:
    """The least share of rows in which a contestant chose the experts that float64 chooses by the spec's logits.

    Records of older versions lack the share for moegate: then the number of rows that were excused as near-ties.
    """
    shares = [each["agreement"] for each in found if "agreement" in each]
    if shares:
        return f"{min(shares):.2%}"
    checked = [each for each in found if "rows" in each and each.get("ok")]
    if not checked:
        return ""
    excused = sum(each.get("excused", 0) for each in checked)
    return f"all but {excused} near-ties" if excused else "all"


def verdicts(rows: list[RecordRow]) -> list[str]:
    """The verdicts on the measurement, one sentence each."""
    said = _of_the_plan(rows)
    for name, gate in ((DEFAULT, "A frozen gate"), (DEFAULT_NOT_FROZEN, "One that is not frozen")):
        for way, where in (("trigger", "in a chain"), ("cold", "cold"), ("hot", "hot")):
            chosen = [row for row in rows if row["way"] == way]
            found = [(faster, row) for row in chosen if (faster := speed_up(row, name)) is not None]
            if not found:
                continue
            values = [ratio for (_, ratio), _ in found]
            (peer, least), row = min(found, key=lambda item: item[0][1])
            said.append(
                f"{gate}, {where}: faster than the best peer in {sum(value > 1 for value in values)} of {len(values)} "
                f"cases, {statistics.median(values):.2f} times as fast in the median, at worst {least:.2f} times "
                f"({row['model']}, M = {row['tokens']}, against {label(peer)})."
            )
    wrong = sorted({name for row in rows for name, each in row["contestants"].items() if each.get("ok") is False})
    if wrong:
        said.append(f"Wrong results, which have no time: {', '.join(map(label, wrong))}.")
    return said


def _of_the_plan(rows: list[RecordRow]) -> list[str]:
    said = []
    for gate, frozen in (("a frozen gate", True), ("one that is not frozen", False)):
        ratios = [(ratio, row) for row in rows if (ratio := plan_ratio(row, frozen=frozen)) is not None]
        if not ratios:
            continue
        worst, row = max(ratios, key=lambda item: item[0])
        open_cases = sum(len(kept_times(row, frozen=frozen)) > 1 for _, row in ratios)
        kept = "keeps" if worst <= ALLOWED else "MISSES"
        said.append(
            f"The default plan of {gate} {kept} the aim of at most {ALLOWED - 1:.0%} above the best candidate that "
            f"keeps the contract: at worst {worst:.3f} of its time ({_case(row)}), in {len(ratios)} cases, "
            f"of which {open_cases} have more than one such candidate."
        )
    twice = [(abs(math.log(ratio)), row) for row in rows if (ratio := timed_twice(row)) is not None]
    if twice:
        apart, row = max(twice, key=lambda item: item[0])
        usual = statistics.median(each for each, _ in twice)
        said.append(
            f"What the measurement cannot tell: the same kernels in two graphs, a frozen gate's and its plan's, lie "
            f"{math.expm1(usual):.1%} apart in the median, at worst {math.expm1(apart):.1%} ({_case(row)})."
        )
    return said


def _case(row: RecordRow) -> str:
    return f"{row['model']}, M = {row['tokens']}, {row['way']}"


def absent(rows: list[RecordRow]) -> list[str]:
    """The contestants that were not measured, a line for each reason."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, found in row["contestants"].items():
            if "absent" in found:
                key = name, found["absent"]
                counts[key] = counts.get(key, 0) + 1
    return [f"{label(name)}, {count} of {len(rows)} cases: {reason}" for (name, reason), count in counts.items()]
