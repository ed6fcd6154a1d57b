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

Row = dict[str, Any]
_SHAPE = re.compile(r"K x N = \d+ x \d+|K=\d+ N=\d+ M=\d+")

TITLES = {
    "route": "The whole route, DeepSeek-V3",
    "gemm": "The product alone, K = 7168, N = 256",
    "fp32": "The product with float32 weights",
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
Microseconds of a call, from CUDA graphs of 58 calls or more: medians over replays, the candidates' graphs in turns
in one run, so that a ratio never mixes two runs. **Cold**: different weights in turn, more than L2 holds where
256 calls suffice for that. **Hot**: one weight. **In a chain**: a kernel writes `hidden`, then the call, cold;
less that kernel alone, measured in the same turns. **Frozen** and **safe** are gates that are frozen and that are not,
whose weight may be changed at any time. The **floor** reads the weight and `hidden` and computes nothing.
A ratio is a peer's time by that of `moegate frozen` (or the first column): above 1, moegate is faster; in brackets
the 10th and 90th percentile of replays side by side. That is the noise of one pair of graphs; two graphs of the same
kernels can differ by more (the page of `moegate bench` says by how much). Every call of a timed graph was held against
float64; a wrong result is shown as **wrong** and has no time. A dash: not supported or not installed.
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


def _verdicts(rows: list[Row]) -> Iterator[str]:
    """Against each peer in how many cases, by how much; every case in which moegate loses beyond the noise."""
    wrong = [f"{_case(row)}: {name}" for row in rows for name, found in row["candidates"].items() if _is_wrong(found)]
    failed = [f"{_case(row)}: {row['failed']}" for row in rows if "failed" in row]
    ratios: dict[tuple[str, str], list[tuple[list[float], Row]]] = {}
    for row in rows:
        for name, found in row["candidates"].items():
            if "ratio" in found and not name.startswith(_NOT_PEERS):
                ratios.setdefault((row["part"], name), []).append((found["ratio"], row))
    yield "The aim: not slower than any peer in any case. A case is won or lost if the whole band of its ratio says so."
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


def _losses_of_others(rows: list[Row]) -> Iterator[str]:
    """Where another column of ours than the first (a gate that is not frozen) is slower than a peer, by the medians."""
    count, lost = 0, []
    for row in rows:
        times = {name: found["us"] for name, found in row["candidates"].items() if "us" in found}
        peers = {name: us for name, us in times.items() if not name.startswith(_NOT_PEERS)}
        ours = [name for name in row["candidates"] if name.startswith("moegate") and not name.endswith("pdl=False")]
        others = [name for name in ours[1:] if name in times]
        for name, (peer, us) in ((name, pair) for name in others for pair in peers.items()):
            count += 1
            if times[name] > 1.005 * us:  # 1.00, as it would be printed, is none
                lost.append(
                    (times[name] / us, f"{_case(row)}: {peer} is {times[name] / us:.2f} times as fast as {name}")
                )
    yield f"**Misses where the weight may change**: {len(lost)} of {count} comparisons, by the medians."
    yield from (f"- {text}" for _, text in sorted(lost, reverse=True))


def _missing(rows: list[Row], part: str) -> list[str]:
    done = {(row["model"], row["tokens"], row["way"]) for row in rows if row["part"] == part}
    return sorted({key[0] for key in keys(part) if key not in done})


def _wins(ratio: list[float]) -> bool:
    return ratio[1] > 1.0


def _loses(ratio: list[float]) -> bool:
    return ratio[2] < 1.0


def _is_wrong(found: dict[str, Any]) -> bool:
    return found.get("ok") is False


def _case(row: Row) -> str:
    return f"{row['part']}, {row['model']}, M = {row['tokens']}, {row['way']}"


def _by_way(rows: list[Row]) -> Iterator[str]:
    """A table a model and way: tokens down, candidates across."""
    for model in dict.fromkeys(row["model"] for row in rows):
        for way in (way for way in WAYS if any((row["model"], row["way"]) == (model, way) for row in rows)):
            chosen = [row for row in rows if (row["model"], row["way"]) == (model, way)]
            chosen.sort(key=lambda row: int(row["tokens"]))
            names = list(dict.fromkeys(name for row in chosen for name in row["candidates"]))
            took_part = {name for row in chosen for name, found in row["candidates"].items() if "absent" not in found}
            names = [name for name in names if name in took_part]
            what = chosen[0].get("what")
            yield f"### {model}{f' ({what})' if what else ''}: {WAYS[way][0].lower()}{WAYS[way][1:]}"
            yield ""
            yield f"| tokens | {' | '.join(names)} |"
            yield "|---" * (len(names) + 1) + "|"
            for row in chosen:
                cells = [_cell(row["candidates"].get(name, {}), name) for name in names]
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


def _errors(rows: list[Row]) -> Iterator[str]:
    """The worst of what the checks found, by candidate."""
    names = dict.fromkeys(name for row in rows for name in row["candidates"])
    said, agree = [], list[str]()
    for name in names:
        found = [row["candidates"].get(name, {}) for row in rows]
        errors = [item["max_error"] for item in found if "max_error" in item]
        agreements = [item["agreement"] for item in found if "agreement" in item]
        excused = sum(item.get("excused", 0) for item in found)
        if errors:
            said.append(f"{name} off float64 by {max(errors):.1e} at most")
        if agreements and min(agreements) == 1.0:
            agree.append(name)
        elif agreements:
            said.append(f"{name} chooses float64's experts in {min(agreements):.2%} of the rows or more")
        elif excused:
            said.append(f"{name}: {excused} of {sum(item.get('rows', 0) for item in found)} rows near-ties")
    if agree:
        said.append(f"float64's experts are chosen in every row by {', '.join(agree)}")
    if said:
        yield "Checked: " + "; ".join(said) + "."
        yield ""


def _catalog(rows: list[Row]) -> Iterator[str]:
    """A line a router: the best peer's ratio at each number of tokens."""
    tokens = sorted({int(row["tokens"]) for row in rows})
    yield "In a chain behind a kernel that triggers. moegate frozen in µs, the ratio to the **best** peer of the case"
    yield "(the fastest with a right result) and, behind the slash, of the safe gate by the frozen one."
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
    floors = [row["candidates"].get("floor", {}) for row in rows]
    shares = [found["ratio"][0] for found in floors if "ratio" in found]
    if shares:
        yield f"The floor takes {statistics.median(shares):.0%} of moegate's time in the median of {len(shares)} cases."


def _catalog_cell(row: Row) -> str:
    candidates = row["candidates"]
    ours = candidates.get("moegate frozen", {})
    if "us" not in ours:
        return "**wrong**" if _is_wrong(ours) else "-"
    peers = [found for name, found in candidates.items() if "ratio" in found and not name.startswith(_NOT_PEERS)]
    best = min((found["ratio"][0] for found in peers), default=None)
    safe = candidates.get("moegate safe", {}).get("ratio")
    shown = f"{ours['us']:.2f}" + ("" if best is None else f", **{best:.2f}**")
    return shown + ("" if safe is None else f" / {safe[0]:.2f}")


def _start(rows: list[Row]) -> Iterator[str]:
    yield "Seconds from `import moegate` to the ids of the first token on the host, in a fresh process that had"
    yield "imported torch and used the GPU; cold: nothing compiled is on the disk."
    yield ""
    for row in rows:
        for name, found in row["candidates"].items():
            value = f"{found['seconds']:.2f} s" if "seconds" in found else found.get("absent", "**wrong**")
            yield f"- {row['way']}: {name} {value}"


def _absent(parts: dict[str, Any]) -> Iterator[str]:
    """Who did not take part, and why, each reason once."""
    reasons: dict[tuple[str, str], int] = {}
    for part in parts.values():
        for row in part["rows"]:
            for name, found in row["candidates"].items():
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
