"""The report as one HTML page that loads nothing else and fits light and dark themes and any width."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from moegate.measure.names import DEFAULT, RecordRow
from moegate.report import plots
from moegate.report.numbers import WAYS, absent, agreement, cell, columns, label, origins, verdicts

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5c6168; --back: #ffffff; --card: #f6f7f8; --rule: #d9dce0; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --soft: #a2a8b0; --back: #15171a; --card: #1d2024; --rule: #363b42; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px clamp(12px, 3vw, 40px) 64px; max-width: 1500px; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 4px; } h2 { margin: 44px 0 4px; font-size: 1.3rem; } h3 { margin: 0 0 4px;
  font-size: 1rem; }
p { margin: 6px 0; max-width: 75ch; } .soft, small { color: var(--soft); } small { font-weight: 400; }
.grid { display: grid; gap: 16px; margin-top: 12px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 360px), 1fr)); }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 8px; padding: 12px; min-width: 0; }
.wide { overflow-x: auto; margin-top: 12px; }
table { border-collapse: collapse; font-size: 0.88rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px 3px 0; text-align: right; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); }
tr.ours td { font-weight: 600; } .wrong { color: #d1495b; font-weight: 600; }
li { margin: 2px 0; overflow-wrap: anywhere; }
summary { cursor: pointer; margin-top: 12px; }
"""
_THEME = """
function theme() {
  const text = getComputedStyle(document.documentElement).getPropertyValue('--text').trim();
  for (const plot of document.querySelectorAll('.plot'))
    Plotly.relayout(plot, {'font.color': text, 'xaxis.color': text, 'yaxis.color': text,
                           'xaxis.gridcolor': 'rgba(128,128,128,0.25)', 'yaxis.gridcolor': 'rgba(128,128,128,0.25)'});
}
for (const plot of document.querySelectorAll('.plot')) {
  const figure = JSON.parse(plot.nextElementSibling.textContent);
  Plotly.newPlot(plot, figure.data, figure.layout, {responsive: true, displaylogo: false, displayModeBar: false});
}
theme();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', theme);
"""


def page(content: dict[str, Any]) -> str:
    """The page of the `runs` and `rows` of bench.json."""
    return "\n".join(_lines(content["runs"], content["rows"]))


def _lines(runs: list[dict[str, Any]], rows: list[RecordRow]) -> Iterator[str]:
    gpus = ", ".join(dict.fromkeys(str(run["gpu"]) for run in runs))
    yield "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
    yield "<meta name='viewport' content='width=device-width, initial-scale=1'>"
    yield f"<title>moegate on {escape(gpus)}</title><style>{_STYLE}</style>"
    yield f"<script>{get_plotlyjs()}</script></head><body>"
    yield f"<h1>MoE routers on {escape(gpus)}</h1>"
    yield "<p class='soft'>Hidden states in, expert ids and weights out: moegate beside what else is installed. "
    yield "Microseconds of a call are medians over replays of CUDA graphs. The contestants' graphs take turns in one "
    yield "run. Every call of a timed graph was compared with float64: a wrong result has no time.</p>"
    yield from _items(verdicts(rows))
    yield from _speed_ups(rows)
    yield from _times(rows)
    yield from _floors(rows)
    yield from _tables(rows)
    yield from _origin(runs, rows)
    yield f"<script>{_THEME}</script></body></html>"


def _speed_ups(rows: list[RecordRow]) -> Iterator[str]:
    chained = [row for row in rows if row["way"] == "trigger"]
    if chained:
        yield "<h2>Speed-up by shape</h2><p class='soft'>The time of the fastest peer with a right result by that of "
        yield "moegate, in a chain. Above 1 moegate is faster.</p>"
        tokens = len({row["tokens"] for row in chained})
        # A narrower plot would have overlapping numbers; the card scrolls instead.
        yield f"<div class='card wide'>{_plot(plots.speed_ups(chained), min_width=160 + 40 * tokens)}</div>"


def _times(rows: list[RecordRow]) -> Iterator[str]:
    yield "<h2>Time by number of tokens</h2><p class='soft'>Both axes are logarithmic. The floor reads the weight and "
    yield "the hidden states, and computes nothing.</p>"
    names = plots.plotted(rows)
    for model in dict.fromkeys(row["model"] for row in rows):
        yield "<div class='grid'>"
        for name, way, own in columns(rows):
            if name == model:
                figure = _plot(plots.time_by_tokens(own, names))
                yield f"<div class='card'><h3>{escape(model)} <small>{escape(WAYS[way])}</small></h3>{figure}</div>"
        yield "</div>"


def _floors(rows: list[RecordRow]) -> Iterator[str]:
    yield "<h2>Share of the floor</h2><p class='soft'>The floor's time divided by moegate's: at 100 % nothing could be "
    yield "faster.</p><div class='grid'>"
    for way, text in WAYS.items():
        own = [row for row in rows if row["way"] == way]
        if own:
            figure = _plot(plots.floor_shares(own))
            yield f"<div class='card'><h3>All models <small>{escape(text)}</small></h3>{figure}</div>"
    yield "</div>"


def _tables(rows: list[RecordRow]) -> Iterator[str]:
    yield "<h2>All times</h2><p class='soft'>Microseconds, and beside them in how many of the compared rows, at least, "
    yield "a contestant chose the experts of float64. Empty: it did not take part.</p>"
    for model, way, own in columns(rows):
        yield f"<details><summary>{escape(model)} <small>{escape(WAYS[way])}</small></summary><div class='wide'><table>"
        heads = "".join(f"<th>M = {row['tokens']}</th>" for row in own)
        yield f"<tr><th>contestant</th>{heads}<th>same experts</th></tr>"
        for name in dict.fromkeys(name for row in own for name in row["contestants"]):
            found = [row["contestants"].get(name, {}) for row in own]
            cells = [cell(each) for each in found]
            if any(cells):
                marked = "".join(f"<td{_mark(text)}>{text}</td>" for text in cells)
                ours = " class='ours'" if name == DEFAULT else ""
                yield f"<tr{ours}><td>{escape(label(name))}</td>{marked}<td>{agreement(found)}</td></tr>"
        yield "</table></div></details>"


def _mark(text: str) -> str:
    return " class='wrong'" if text == "wrong" else ""


def _origin(runs: list[dict[str, Any]], rows: list[RecordRow]) -> Iterator[str]:
    yield "<h2>Where the numbers come from</h2>"
    yield from _items(origins(runs))
    missing = absent(rows)
    if missing:
        yield "<details><summary>Who did not take part</summary>"
        yield from _items(missing)
        yield "</details>"


def _items(texts: Any) -> Iterator[str]:
    yield "<ul>"
    yield from (f"<li>{escape(text)}</li>" for text in texts)
    yield "</ul>"


def _plot(figure: go.Figure, min_width: int = 0) -> str:
    """A figure's element, at least `min_width` pixels wide, and a script with the data, in which `</` is escaped."""
    data = figure.to_json().replace("</", "<\\/")
    size = f"height:{figure.layout.height}px;min-width:{min_width}px"
    return f"<div class='plot' style='{size}'></div><script type='application/json'>{data}</script>"
