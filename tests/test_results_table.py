"""The CSV files with the medians of records, which git keeps."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUN = {"gpu": "NVIDIA H100", "sm_count": 132, "driver": "1", "torch": "2", "cuda": "3", "flashinfer": "4"}
RUN |= {"transformers": "5", "python": "6", "moegate": "7", "moegate_commit": "8", "command": "make, fast"}
OURS = {"us": 3.1204, "ratio": [1.0, 1.0, 1.0], "ok": True}


def write_record(file: Path, run: str, *rows: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    runs = [{"id": run, "date": f"2026-11-{run}", **RUN}]
    file.write_text(json.dumps({"runs": runs, "rows": [{"run": run, **row} for row in rows]}))


def row(part: str, tokens: int, way: str = "cold", **contestants: dict[str, Any]) -> dict[str, Any]:
    return {"part": part, "model": "deepseek-v3", "tokens": tokens, "way": way, "contestants": contestants}


def tabulate(folder: Path, file: Path) -> list[list[str]]:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "gpu" / "table.py", folder, file], check=True)
    with file.open(newline="") as text:
        return list(csv.reader(text))[1:]


def runs_of(file: Path) -> list[dict[str, str]]:
    with file.with_name(f"{file.stem}_runs.csv").open(newline="") as text:
        return list(csv.DictReader(text))


def test_a_row_for_each_right_result(tmp_path: Path) -> None:
    peer = {"us": 5.73049, "ratio": [1.8351, 1.8201, 1.8499], "ok": True}
    wrong, absent = {"us": 0.1, "ratio": [0.03, 0.03, 0.03], "ok": False}, {"absent": "not installed"}
    floor, before = {"us": 0.78901, "ratio": [0.25, 0.24, 0.26], "ok": True}, {"us": 2.2}
    given: dict[str, Any] = {
        "ours": OURS,
        "peer": peer,
        "wrong": wrong,
        "absent": absent,
        "floor": floor,
        "predecessor alone": before,
    }
    write_record(tmp_path / "in" / "route.json", "25", row("route", 1, **given))
    write_record(tmp_path / "in" / "bench" / "bench.json", "26", row("bench", 1, ours={"seconds": 1.446964}))
    file = tmp_path / "h100.csv"
    assert tabulate(tmp_path / "in", file) == [
        ["bench", "deepseek-v3", "1", "cold", "ours", "1446964", "", "", "", "26"],
        ["route", "deepseek-v3", "1", "cold", "ours", "3.12", "", "", "", "25"],
        ["route", "deepseek-v3", "1", "cold", "peer", "5.73", "1.84", "1.82", "1.85", "25"],
        ["route", "deepseek-v3", "1", "cold", "floor", "0.789", "", "", "", "25"],
    ]
    first, second = runs_of(file)
    assert (first["run"], first["card"], first["torch"], first["moegate"]) == ("25", "NVIDIA H100", "2", "7")
    assert (first["commit"], first["date"], first["command"]) == ("8", "2026-11-25", "make, fast")
    assert second["run"] == "26"


def test_what_is_measured_anew_takes_the_place_of_the_same_case_alone(tmp_path: Path) -> None:
    file = tmp_path / "h100.csv"
    write_record(
        tmp_path / "old" / "route.json", "25", row("route", 2, ours=OURS, gone=OURS), row("route", 10, ours=OURS)
    )
    write_record(tmp_path / "old" / "gemm.json", "24", row("gemm", 2, ours=OURS))
    tabulate(tmp_path / "old", file)
    write_record(tmp_path / "new" / "route.json", "26", row("route", 2, ours=OURS), row("route", 2, "hot", ours=OURS))
    write_record(tmp_path / "new" / "gemm.json", "27", row("gemm", 2, ours=OURS))
    tabulated = tabulate(tmp_path / "new", file)
    assert [(each[0], each[2], each[3], each[4], each[-1]) for each in tabulated] == [
        ("gemm", "2", "cold", "ours", "27"),
        ("route", "2", "cold", "ours", "26"),
        ("route", "2", "hot", "ours", "26"),
        ("route", "10", "cold", "ours", "25"),
    ]
    assert [run["run"] for run in runs_of(file)] == ["25", "26", "27"]  # run 24 has no rows left


def test_git_keeps_small_tables_alone() -> None:
    assert "benchmarks/results/*/\n" in (ROOT / ".gitignore").read_text()
    for file in RESULTS.iterdir():
        assert file.is_dir() or (file.suffix == ".csv" and file.stat().st_size < 450_000), file


def test_every_row_names_its_run() -> None:
    tables = [file for file in RESULTS.glob("*.csv") if file.with_name(f"{file.stem}_runs.csv").exists()]
    assert tables
    for table in tables:
        with table.open(newline="") as text:
            named = {row["run"] for row in csv.DictReader(text)}
        assert named == {run["run"] for run in runs_of(table)}
