"""The medians of a folder of records as a small CSV, which git keeps: `python benchmarks/gpu/table.py DIR FILE.csv`.

The records are the JSON files of `benchmarks/gpu/run.py --out DIR` and of `moegate bench --out DIR/ANY`. FILE.csv has a
row for each contestant with a right result: the microseconds of a call and, except for the first contestant and the
floor, the ratio to the first contestant's time: median, 10th and 90th percentile over pairs of replays in one turn.
FILE_runs.csv has the card, versions, commit and date of each run. The cases of DIR replace the same cases in FILE.csv;
other cases stay.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

CsvRow = dict[str, str]
CASE = ("part", "model", "tokens", "way")
COLUMNS = (*CASE, "contestant", "us", "ratio", "ratio_low", "ratio_high", "run")
RUN_COLUMNS = {
    "run": "id",
    "date": "date",
    "card": "gpu",
    "sm_count": "sm_count",
    "driver": "driver",
    "torch": "torch",
    "cuda": "cuda",
    "flashinfer": "flashinfer",
    "transformers": "transformers",
    "python": "python",
    "moegate": "moegate",
    "commit": "moegate_commit",
    "command": "command",
}


def main() -> None:
    """Writes both files."""
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(__doc__)
    folder, file = map(Path, sys.argv[1:])
    runs_file = file.with_name(f"{file.stem}_runs.csv")
    records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.rglob("*.json"))]
    rows = merged(_read(file), [row for record in records for row in _rows(record)])
    known = {run["run"]: run for run in [*_read(runs_file), *(run for record in records for run in _runs(record))]}
    _write(file, COLUMNS, rows)
    needed = {row["run"] for row in rows}
    _write(runs_file, RUN_COLUMNS, sorted((known[run] for run in needed), key=lambda run: run["date"]))


def merged(old: list[CsvRow], new: list[CsvRow]) -> list[CsvRow]:
    """The new rows, and the old rows of all other cases, ordered by case."""
    measured = {_case(row) for row in new}
    return sorted([*(row for row in old if _case(row) not in measured), *new], key=_case)


def _case(row: CsvRow) -> tuple[str, str, int, str]:
    return row["part"], row["model"], int(row["tokens"]), row["way"]


def _rows(record: dict[str, Any]) -> Iterator[CsvRow]:
    for row in record["rows"]:
        case = {name: str(row[name]) for name in CASE}
        for name, found in row["contestants"].items():
            time = found.get("us", 1e6 * found.get("seconds", 0))
            if not time or found.get("ok") is False or name.startswith("predecessor"):
                continue
            ratio = found.get("ratio", [])
            if name == "floor" or ratio == [1.0, 1.0, 1.0]:  # the floor is no peer; the first contestant has ratio 1
                ratio = []
            ratios = dict(zip(COLUMNS[6:9], (f"{value:.3g}" for value in ratio), strict=False))
            yield {
                **case,
                "contestant": name,
                "us": f"{time:.4g}" if time < 1e4 else f"{time:.0f}",
                **ratios,
                "run": row["run"],
            }


def _runs(record: dict[str, Any]) -> Iterator[CsvRow]:
    for run in record["runs"]:
        yield {column: str(run.get(name, "")) for column, name in RUN_COLUMNS.items()}


def _read(file: Path) -> list[CsvRow]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as text:
        return list(csv.DictReader(text))


def _write(file: Path, columns: Iterable[str], rows: Iterable[CsvRow]) -> None:
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.DictWriter(text, list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
