"""The report of `moegate bench`, from committed measurements: numbers and page."""

from __future__ import annotations

import copy
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import refused, run

from moegate.report import numbers

DATA = Path(__file__).parent / "data"
CONTENT: dict[str, Any] = json.loads((DATA / "bench.json").read_text())
PAIR = "flashinfer:mm_M1_16_K7168_N256+fused_topk_deepseek"


@pytest.fixture
def content() -> dict[str, Any]:
    return copy.deepcopy(CONTENT)


def row_of(content: dict[str, Any], tokens: int, way: str = "trigger") -> dict[str, Any]:
    (row,) = [row for row in content["rows"] if (row["tokens"], row["way"]) == (tokens, way)]
    assert isinstance(row, dict)
    return row


def test_numbers_of_a_row(content: dict[str, Any]) -> None:
    row = row_of(content, 1)
    times = {name: found["us"] for name, found in row["contestants"].items() if "us" in found}
    assert numbers.best_peer(row) == (PAIR, times[PAIR])
    assert numbers.speed_up(row) == (PAIR, times[PAIR] / times["moegate"])
    assert numbers.share_of_floor(row) == times["floor"] / times["moegate"]
    assert numbers.plan_ratio(row) == 1.0


def test_a_plan_is_held_against_other_kernels_and_the_gate_against_its_own(content: dict[str, Any]) -> None:
    row = row_of(content, 64)
    chosen, other = row["plan"], "torch:mm+ops"
    row["keeps_contract"].append(other)
    row["contestants"][chosen]["us"] = row["contestants"]["moegate"]["us"] / 1.5
    assert numbers.plan_ratio(row) == 1.0
    assert numbers.timed_twice(row) == pytest.approx(1.5)
    row["contestants"][other]["us"] = row["contestants"][chosen]["us"] / 1.08
    assert numbers.plan_ratio(row) == pytest.approx(1.08)
    plan, twice, *_ = numbers.verdicts(content["rows"])
    assert "The default plan of a frozen gate MISSES the aim" in plan
    assert "at worst 1.080 of its time (deepseek-v3, M = 64, trigger)" in plan
    assert "of which 1 have more than one such candidate" in plan
    assert "at worst 50.0% (deepseek-v3, M = 64, trigger)" in twice

    assert numbers.plan_ratio(row, frozen=False) is None  # an old record, without this plan
    row["contestants"][other]["us"] = 70.0
    row["plan_not_frozen"] = chosen + ", not frozen"
    row["contestants"] |= {
        name + ", not frozen": {"us": us, "ok": True} for name, us in ((chosen, 9.0), ("cuda:cublas+select", 10.0))
    }
    assert numbers.plan_ratio(row, frozen=False) == 1.0
    row["plan_not_frozen"] = "cuda:cublas+select, not frozen"
    assert numbers.plan_ratio(row, frozen=False) == pytest.approx(10 / 9)
    row["contestants"][other]["us"] = 8.0  # the torch backend has one time, frozen or not
    assert numbers.plan_ratio(row, frozen=False) == pytest.approx(10 / 8)
    assert "one that is not frozen MISSES the aim" in numbers.verdicts(content["rows"])[1]


def test_a_wrong_result_has_no_time_anywhere(content: dict[str, Any]) -> None:
    from moegate.report.page import page

    row = row_of(content, 1)
    row["contestants"][PAIR].update(ok=False, us=0.1234)
    assert numbers.time_of(row, PAIR) is None
    best = numbers.best_peer(row)
    assert best is not None
    assert best[0] != PAIR
    text = page(content)
    assert "<td class='wrong'>wrong</td>" in text
    assert "0.1234" not in text
    assert ">0.12<" not in text
    assert "Wrong results, which have no time: FlashInfer GEMM + FlashInfer top-k." in text


class Outline(HTMLParser):
    """The open tags of a page, the URLs that the page would fetch, and the figures."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.figures: list[dict[str, Any]] = []
        self._is_figure = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.fetched += [str(given[name]) for name in ("src", "href") if name in given]
        self._is_figure = given.get("type") == "application/json"
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._is_figure:
            self.figures.append(json.loads(data))
            self._is_figure = False


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    from moegate.report.page import page

    text = page(CONTENT)
    outline = Outline()
    outline.feed(text)
    assert outline.open == []
    assert outline.fetched == []
    assert "NVIDIA H200" in text
    assert "prefers-color-scheme: dark" in text
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles[:4] == ["Speed-up by shape", "Time by number of tokens", "Share of the floor", "All times"]
    assert len(outline.figures) == 1 + 3 + 3
    line = next(trace for trace in outline.figures[1]["data"] if trace["name"] == "moegate")
    assert line["x"] == [1, 4, 16, 64]
    assert line["y"] == [row_of(CONTENT, tokens)["contestants"]["moegate"]["us"] for tokens in (1, 4, 16, 64)]


def test_names_of_models_cannot_become_tags(content: dict[str, Any]) -> None:
    from moegate.report.page import page

    for row in content["rows"]:
        row["model"] = "</script><b>x"
    outline = Outline()
    outline.feed(page(content))
    assert "b" not in outline.open


def test_render_makes_the_page_without_a_gpu(tmp_path: Path) -> None:
    shutil.copy(DATA / "bench.json", tmp_path)
    result = run("bench", "--render", tmp_path, columns=120)
    assert result.exit_code == 0
    assert (tmp_path / "bench.html").stat().st_size > 1_000_000
    ours = row_of(CONTENT, 16)["contestants"]["moegate"]["us"]
    assert re.search(rf"^moegate .*{ours:.2f}.*all", result.stdout, flags=re.MULTILINE)
    assert "2026-11-24: NVIDIA H200" in result.stdout
    assert "One that is not frozen, hot: faster than the best peer in" in result.stdout
    assert "The default plan of a frozen gate keeps the aim" in " ".join(result.stdout.split())
    printed = json.loads(run("bench", "--render", tmp_path, "--json").stdout)
    assert printed == CONTENT


def test_no_time_is_cut_off_on_a_narrow_console(tmp_path: Path, content: dict[str, Any]) -> None:
    for row in [row for row in content["rows"] if row["tokens"] == 64]:
        for more, tokens in enumerate((128, 256, 1024, 4096, 16384)):
            contestants = {
                name: {**each, "us": 100.0 * (more + 1) + index} if "us" in each else each
                for index, (name, each) in enumerate(row["contestants"].items())
            }
            content["rows"].append({**row, "tokens": tokens, "contestants": contestants})
    (tmp_path / "bench.json").write_text(json.dumps(content))
    printed = run("bench", "--render", tmp_path, columns=80).stdout
    assert "…" not in printed
    assert printed.count("same experts\n") >= 6
    assert printed.count("all\n") >= 6
    assert max(map(len, printed.partition("The default plan")[0].splitlines()[1:])) <= 80
    for row in content["rows"]:
        assert f"M={row['tokens']}" in printed
        for found in row["contestants"].values():
            assert "us" not in found or f"{found['us']:.2f}" in printed


def test_without_plotly_the_way_to_the_page_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    shutil.copy(DATA / "bench.json", tmp_path)
    monkeypatch.setitem(sys.modules, "plotly", None)
    for name in ("moegate.report.page", "moegate.report.plots"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "pip install moegate[bench]" in refused("bench", "--render", tmp_path)
    assert not (tmp_path / "bench.html").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"rows": []}', '{"runs": []}'])
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "bench.json").write_text(text)
    assert str(tmp_path / "bench.json") in refused("bench", "--render", tmp_path)


def test_wrong_arguments(tmp_path: Path) -> None:
    assert "No such file" in refused("bench", "--render", tmp_path)
    assert "--render: allowed without" in refused("bench", "deepseek-v3", "--render", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_line_says_what_is_missing() -> None:
    assert "moegate bench needs an NVIDIA GPU" in refused("bench", "deepseek-v3")
