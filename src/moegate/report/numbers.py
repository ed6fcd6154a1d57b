"""What the rows of `moegate bench` say: times with their agreement, ratios, verdicts. A wrong result has no time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

from moegate.measure.names import DEFAULT, FLOOR, NOT_FROZEN, PREDECESSOR, SAFE

Row = dict[str, Any]
WAYS = {
    "trigger": "in a chain, behind a kernel that lets it start at once",
    "cold": "cold: other weights in each call, more than the cache holds",
    "hot": "hot: one weight",
}
ALLOWED = 1.05
"""How much slower than the best candidate that keeps the contract a default plan may be."""
_OURS = (DEFAULT, SAFE, FLOOR, PREDECESSOR)


def columns(rows: list[Row]) -> Iterator[tuple[str, str, list[Row]]]:
    """(model, way, its rows by number of tokens), in the order of the file."""
    for model in models(rows):
        for way in WAYS:
            chosen = [row for row in rows if (row["model"], row["way"]) == (model, way)]
            if chosen:
                yield model, way, sorted(chosen, key=lambda row: int(row["tokens"]))


def models(rows: list[Row]) -> list[str]:
    """The models, in the order of the file."""
    return list(dict.fromkeys(row["model"] for row in rows))


def time_of(row: Row, name: str) -> float | None:
    """Microseconds of a candidate whose result is right."""
    found = row["candidates"].get(name, {})
    return float(found["us"]) if found.get("ok") and found.get("us", 0) > 0 else None


def is_peer(name: str) -> bool:
    """True for what others run: not the kernels that moegate's plans choose among, and no bound."""
    return name not in _OURS and not name.startswith("cuda:")


def best_peer(row: Row) -> tuple[str, float] | None:
    """The fastest peer with a right result, and its time."""
    times = {name: time for name in row["candidates"] if is_peer(name) and (time := time_of(row, name)) is not None}
    return min(times.items(), key=lambda item: item[1]) if times else None


def speed_up(row: Row, name: str = DEFAULT) -> tuple[str, float] | None:
    """The best peer, and how many times as fast as it the default plan is, or another candidate."""
    best, ours = best_peer(row), time_of(row, name)
    return None if best is None or ours is None else (best[0], best[1] / ours)


def origins(runs: list[dict[str, Any]]) -> list[str]:
    """Where and when each run measured what, with which versions."""
    return [
        f"{run['date'][:10]}: {run['gpu']} ({run.get('sm_count')} multiprocessors, driver {run.get('driver')}), "
        f"torch {run['torch']}, CUDA {run['cuda']}, FlashInfer {run['flashinfer']}, "
        f"Transformers {run['transformers']}, moegate {run['moegate_commit']}: {run['command']}"
        for run in runs
    ]


def share_of_floor(row: Row) -> float | None:
    """The floor's part in the time of the default plan."""
    floor, ours = time_of(row, FLOOR), time_of(row, DEFAULT)
    return None if floor is None or ours is None else floor / ours


def kept_times(row: Row, *, frozen: bool = True) -> list[float]:
    """The times of the candidates that keep the contract; only our kernels differ for a gate that is not frozen."""
    names = [f"{name}{'' if frozen or not name.startswith('cuda:') else NOT_FROZEN}" for name in row["keeps_contract"]]
    return [time for name in names if (time := time_of(row, name)) is not None]


def plan_ratio(row: Row, *, frozen: bool = True) -> float | None:
    """The time of what the plan chose by that of the best candidate that keeps the contract; None: no time for it.

    Both as candidates, each in a graph of its own: `DEFAULT` is the chosen one once more, which `timed_twice` tells.
    """
    times = kept_times(row, frozen=frozen)
    chosen = time_of(row, row["plan"] if frozen else row.get("plan_not_frozen", ""))
    return None if chosen is None or not times else chosen / min(times)


def timed_twice(row: Row) -> float | None:
    """The gate's time by that of its plan as a candidate, which runs the same kernels: how far two graphs lie apart."""
    gate, chosen = time_of(row, DEFAULT), time_of(row, row["plan"])
    return None if gate is None or chosen is None else gate / chosen


def label(name: str) -> str:
    """A candidate's name for people."""
    backend, _, kernel = name.partition(":")
    if backend == "flashinfer":
        product, _, top_k = kernel.partition("+")
        product = {"cublas": "cuBLAS", "tinygemm_bf16": "FlashInfer tinygemm"}.get(product, "FlashInfer GEMM")
        return f"{product} + FlashInfer top-k" if top_k else f"{product} + our select"
    return {"torch": "PyTorch eager", "cuda": f"cuda {kernel}"}.get(backend, name)


def cell(found: dict[str, Any]) -> str:
    """A time, or what is in its place."""
    if found.get("ok") is False:
        return "wrong"
    return f"{found['us']:.2f}" if "us" in found else ""


def agreement(found: list[dict[str, Any]]) -> str:
    """In how many rows, at least, a candidate chose the experts of float64 (of its logits as the spec rounds them).

    For ours of older measurements, which do not say: how many differ from those of the exact logits, as near-ties may.
    """
    shares = [each["agreement"] for each in found if "agreement" in each]
    if shares:
        return f"{min(shares):.2%}"
    checked = [each for each in found if "rows" in each and each.get("ok")]
    if not checked:
        return ""
    excused = sum(each.get("excused", 0) for each in checked)
    return f"all but {excused} near-ties" if excused else "all"


def verdicts(rows: list[Row]) -> list[str]:
    """What the measurement says, in sentences."""
    said = _of_the_plan(rows)
    for name, gate in ((DEFAULT, "A frozen gate"), (SAFE, "One that is not frozen")):
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
    wrong = sorted({name for row in rows for name, each in row["candidates"].items() if each.get("ok") is False})
    if wrong:
        said.append(f"Wrong results, which have no time: {', '.join(map(label, wrong))}.")
    return said


def _of_the_plan(rows: list[Row]) -> list[str]:
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


def _case(row: Row) -> str:
    return f"{row['model']}, M = {row['tokens']}, {row['way']}"


def absent(rows: list[Row]) -> list[str]:
    """Who did not take part, and why, each reason once."""
    counts: dict[tuple[str, str], int] = {}
    for row in rows:
        for name, found in row["candidates"].items():
            if "absent" in found:
                key = name, found["absent"]
                counts[key] = counts.get(key, 0) + 1
    return [f"{label(name)}, {count} of {len(rows)} cases: {reason}" for (name, reason), count in counts.items()]
