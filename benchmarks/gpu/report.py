"""The page of the measurements: `python benchmarks/gpu/report.py DIR > docs/performance.md`."""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # called by path, as the other benchmarks are

from benchmarks.gpu.parts import keys
from moegate.measure.names import DEFAULT, DEFAULT_NOT_FROZEN, FLOOR, NO_PDL, RecordRow

_SHAPE = re.compile(r"K x N = \d+ x \d+|K=\d+ N=\d+ M=\d+")

TITLES = {
    "route": "The whole route, DeepSeek-V3",
    "gemm": "The GEMM alone, K = 7168, N = 256",
    "fp32": "The GEMM with float32 weights",
    "select": "The selection alone",
    "prefill": "Prefill",
    "catalog": "Every router of the catalog",
    "host": "What a call costs the host",
    "start": "From import to the first token",
}
WAYS = {
    "trigger": "In a chain, behind a kernel that triggers its dependents at once",
    "norm": "In a chain, behind a norm that never triggers",
    "cold": "Cold",
    "hot": "Hot",
    "host": "Eager calls",
}
_HEAD = """\
# Speed on a GPU

Written by `python benchmarks/gpu/report.py DIR`; every number comes from `python benchmarks/gpu/run.py --out DIR`.
Times are microseconds of a call, from CUDA graphs of 58 calls or more: the median over the replays. The contestants'
graphs take turns in one run, and no ratio mixes two runs. Every call of a timed graph was compared with float64.

| word | meaning |
|---|---|
| cold | different weights in turn, more than L2 holds where 256 calls suffice for that |
| hot | one weight |
| in a chain | a kernel writes `hidden`, then the call runs, cold; less the time of the predecessor alone |
| predecessor alone | the kernel that writes `hidden`, measured in the same turns |
| `moegate` | a frozen gate; the GEMM alone is that of a frozen gate |
| `moegate, not frozen` | a gate whose weight may change at any time |
| floor | a kernel that reads the weight and `hidden`, and computes nothing |
| (3.69-3.86) | the 10th and 90th percentile of a time |
| **ratio** | a peer's time divided by that of the first column; above 1, moegate is faster |
| [2.37, 2.48] | the 10th and 90th percentile of a ratio, over pairs of replays in one turn |
| **wrong** | a wrong result, which has no time |
| - | not supported, or not installed |

A ratio's percentiles are the noise of one pair of graphs. Two graphs of the same kernels can differ by more; the page
of `moegate bench` says by how much.
"""
_NOT_PEERS = ("moegate", "floor", "predecessor")


def main() -> None:
    """Prints the page."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1])
    parts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    print("\n".join(page({name: parts[name] for name in TITLES if name in parts})))


def page(parts: dict[str, Any]) -> list[str]:
    """The lines of the page."""
    lines = [_HEAD, *_machines(parts)]
    graphed = [row for name, part in parts.items() if name not in ("host", "start") for row in part["rows"]]
    lines += ["", "## Wins and misses", "", *_verdicts(graphed)]
    for name, part in parts.items():
        lines += ["", f"## {TITLES[name]}", ""]
        if name == "catalog":
            lines += _catalog(part["rows"])
        elif name == "start":
            lines += _start(part["rows"])
        else:
            lines += _by_way(part["rows"])
    return [*lines, *_absent(parts)]


def _machines(parts: dict[str, Any]) -> Iterator[str]:
    runs = {run["id"]: run for part in parts.values() for run in part["runs"]}
    for run in sorted(runs.values(), key=lambda run: run["date"]):
        gpu = f"{run['gpu']} ({run.get('sm_count')} SMs, driver {run.get('driver')})"
        versions = f"torch {run['torch']}, CUDA {run['cuda']}, FlashInfer {run['flashinfer']}"
        yield f"- run `{run['id']}`, {run['date'][:10]}: {gpu}, {versions}, transformers {run['transformers']},"
        yield f"  moegate `{run['moegate_commit']}`; `{run['command']}`"


def _verdicts(rows: list[RecordRow]) -> Iterator[str]:
    """A table of wins and losses against each peer, then every case in which moegate is slower beyond the noise."""
    wrong = [f"{_case(row)}: {name}" for row in rows for name, found in row["contestants"].items() if _is_wrong(found)]
    failed = [f"{_case(row)}: {row['failed']}" for row in rows if "failed" in row]
    ratios: dict[tuple[str, str], list[tuple[list[float], RecordRow]]] = {}
    for row in rows:
        for name, found in row["contestants"].items():
            if "ratio" in found and not name.startswith(_NOT_PEERS):
                ratios.setdefault((row["part"], name), []).append((found["ratio"], row))
    yield "The aim: no peer is faster in any case. In a case, moegate is faster or slower than a peer if the 10th and"
    yield "90th percentile of the ratio agree on it."
    yield ""
    yield "| part | peer | cases | faster | within noise | slower | median ratio | worst |"
    yield "|---|---|---|---|---|---|---|---|"
    for (part, name), found in ratios.items():
        wins, losses = (sum(test(ratio) for ratio, _ in found) for test in (_wins, _loses))
        values = [ratio[0] for ratio, _ in found]
        even = len(found) - wins - losses
        middle = statistics.median(values)
        yield f"| {part} | {name} | {len(found)} | {wins} | {even} | {losses} | {middle:.2f} | {min(values):.2f} |"
    yield ""
    lost = [(ratio, name, row) for (_, name), found in ratios.items() for ratio, row in found if _loses(ratio)]
    yield f"**Misses**: {len(lost)} comparisons in which moegate is slower than the peer beyond the noise."
    for ratio, name, row in sorted(lost, key=lambda item: item[0][0]):
        yield f"- {_case(row)}: {name} is {1 / ratio[0]:.2f} times as fast {_brackets(ratio)}"
    yield ""
    yield from _losses_of_others(rows)
    parts = dict.fromkeys(row["part"] for row in rows)
    missing = [f"{part}: {', '.join(names)}" for part in parts if (names := _missing(rows, part))]
    for title, items in (("Wrong results", wrong), ("Failed", failed), ("Parts with models not measured yet", missing)):
        yield ""
        yield f"**{title}**: {len(items)}."
        yield from (f"- {item}" for item in items)


def _losses_of_others(rows: list[RecordRow]) -> Iterator[str]:
    """The cases in which another column of moegate's (a weight that is not frozen) is slower by the medians."""
    count, lost = 0, []
    for row in rows:
        times = {name: found["us"] for name, found in row["contestants"].items() if "us" in found}
        peers = {name: us for name, us in times.items() if not name.startswith(_NOT_PEERS)}
        ours = [name for name in row["contestants"] if name.startswith("moegate") and name != NO_PDL]
        others = [name for name in ours[1:] if name in times]
        for name, (peer, us) in ((name, pair) for name in others for pair in peers.items()):
            count += 1
            if times[name] > 1.005 * us:  # less is printed as 1.00
                lost.append(
                    (times[name] / us, f"{_case(row)}: {peer} is {times[name] / us:.2f} times as fast as {name}")
                )
    yield f"**Misses with a weight that is not frozen**: {len(lost)} of {count} comparisons, by the medians."
    yield from (f"- {text}" for _, text in sorted(lost, reverse=True))


def _missing(rows: list[RecordRow], part: str) -> list[str]:
    done = {(row["model"], row["tokens"], row["way"]) for row in rows if row["part"] == part}
    return sorted({key[0] for key in keys(part) if key not in done})


def _wins(ratio: list[float]) -> bool:
    return ratio[1] > 1.0


def _loses(ratio: list[float]) -> bool:
    return ratio[2] < 1.0


def _is_wrong(found: dict[str, Any]) -> bool:
    return found.get("ok") is False


def _case(row: RecordRow) -> str:
    return f"{row['part']}, {row['model']}, M = {row['tokens']}, {row['way']}"


def _by_way(rows: list[RecordRow]) -> Iterator[str]:
    """A table for each model and way: tokens down, contestants across."""
    for model in dict.fromkeys(row["model"] for row in rows):
        for way in (way for way in WAYS if any((row["model"], row["way"]) == (model, way) for row in rows)):
            chosen = [row for row in rows if (row["model"], row["way"]) == (model, way)]
            chosen.sort(key=lambda row: int(row["tokens"]))
            names = list(dict.fromkeys(name for row in chosen for name in row["contestants"]))
            took_part = {name for row in chosen for name, found in row["contestants"].items() if "absent" not in found}
            names = [name for name in names if name in took_part]
            what = chosen[0].get("what")
            yield f"### {model}{f' ({what})' if what else ''}: {WAYS[way][0].lower()}{WAYS[way][1:]}"
            yield ""
            yield f"| tokens | {' | '.join(names)} |"
            yield "|---" * (len(names) + 1) + "|"
            for row in chosen:
                cells = [_cell(row["contestants"].get(name, {}), name) for name in names]
                yield f"| {row['tokens']} | {' | '.join(cells)} |"
            yield ""
            yield from _errors(chosen)


def _cell(found: dict[str, Any], name: str) -> str:
    if _is_wrong(found):
        return "**wrong**"
    if "us" not in found:
        return "-"
    time = f"{found['us']:.2f}"
    ratio = found.get("ratio")
    if ratio is None or name.startswith(_NOT_PEERS) or ratio[0] == ratio[1] == ratio[2] == 1.0:
        return time if "low" not in found else f"{time} ({found['low']:.2f}-{found['high']:.2f})"
    return f"{time}, **{ratio[0]:.2f}** {_brackets(ratio)}"


def _brackets(ratio: list[float]) -> str:
    return f"[{ratio[1]:.2f}, {ratio[2]:.2f}]"


def _errors(rows: list[RecordRow]) -> Iterator[str]:
    """The worst findings of the checks, by contestant."""
    names = dict.fromkeys(name for row in rows for name in row["contestants"])
    said, agree = [], list[str]()
    for name in names:
        found = [row["contestants"].get(name, {}) for row in rows]
        errors = [item["max_error"] for item in found if "max_error" in item]
        agreements = [item["agreement"] for item in found if "agreement" in item]
        excused = sum(item.get("excused", 0) for item in found)
        if errors:
            said.append(f"`{name}` is off float64 by {max(errors):.1e} at most")
        if agreements and min(agreements) == 1.0:
            agree.append(f"`{name}`")
        elif agreements:
            said.append(f"`{name}` chooses float64's experts in {min(agreements):.2%} of the rows or more")
        elif excused:
            said.append(f"`{name}`: {excused} of {sum(item.get('rows', 0) for item in found)} rows near-ties")
    if agree:
        said.append(f"float64's experts are chosen in every row by {', '.join(agree)}")
    if said:
        yield "Checked: " + "; ".join(said) + "."
        yield ""


def _catalog(rows: list[RecordRow]) -> Iterator[str]:
    """A line a router: time and ratios at each number of tokens."""
    tokens = sorted({int(row["tokens"]) for row in rows})
    yield "In a chain, behind a kernel that triggers its dependents at once. A cell has the microseconds of"
    yield f"`{DEFAULT}`, the **ratio** of the case's best peer (the fastest with a right result) and, behind the slash,"
    yield f"the time of `{DEFAULT_NOT_FROZEN}` divided by that of `{DEFAULT}`."
    yield ""
    yield f"| router | {' | '.join(f'{m}' for m in tokens)} | kernels | run |"
    yield "|---" * (len(tokens) + 3) + "|"
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        cells = {int(row["tokens"]): _catalog_cell(row) for row in own}
        kernels = ", ".join(dict.fromkeys(row.get("kernel", "") for row in own))
        runs = ", ".join(dict.fromkeys(f"`{row['run']}`" for row in own))
        yield f"| {model} | {' | '.join(cells.get(m, '') for m in tokens)} | {kernels} | {runs} |"
    yield ""
    floors = [row["contestants"].get(FLOOR, {}) for row in rows]
    shares = [found["ratio"][0] for found in floors if "ratio" in found]
    if shares:
        yield f"The floor's time is {statistics.median(shares):.0%} of moegate's, the median of {len(shares)} cases."


def _catalog_cell(row: RecordRow) -> str:
    contestants = row["contestants"]
    ours = contestants.get(DEFAULT, {})
    if "us" not in ours:
        return "**wrong**" if _is_wrong(ours) else "-"
    peers = [found for name, found in contestants.items() if "ratio" in found and not name.startswith(_NOT_PEERS)]
    best = min((found["ratio"][0] for found in peers), default=None)
    not_frozen = contestants.get(DEFAULT_NOT_FROZEN, {}).get("ratio")
    shown = f"{ours['us']:.2f}" + ("" if best is None else f", **{best:.2f}**")
    return shown + ("" if not_frozen is None else f" / {not_frozen[0]:.2f}")


def _start(rows: list[RecordRow]) -> Iterator[str]:
    yield "Seconds from `import moegate` to the ids of the first token on the host, in a new process that had imported"
    yield "torch and used the GPU. Cold: no compiled kernel is on the disk. Warm: all are."
    yield ""
    for row in rows:
        for name, found in row["contestants"].items():
            value = f"{found['seconds']:.2f} s" if "seconds" in found else found.get("absent", "**wrong**")
            yield f"- {row['way']}: {name} {value}"


def _absent(parts: dict[str, Any]) -> Iterator[str]:
    """The contestants that were not measured, a line for each reason."""
    reasons: dict[tuple[str, str], int] = {}
    for part in parts.values():
        for row in part["rows"]:
            for name, found in row["contestants"].items():
                if "absent" in found:
                    key = name, _SHAPE.sub("the shape", found["absent"])  # one line for all shapes
                    reasons[key] = reasons.get(key, 0) + 1
    if reasons:
        yield ""
        yield "## Who did not take part"
        yield ""
    for (name, reason), count in reasons.items():
        yield f"- {name}, {count} case{'s' if count > 1 else ''}: {reason}"


if __name__ == "__main__":
    main()
