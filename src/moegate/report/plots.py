"""The plots of the report, by plotly. Background and text colour are left to the page's theme."""

from __future__ import annotations

import math
from typing import Any

import plotly.graph_objects as go

from moegate.measure.names import DEFAULT, DEFAULT_NOT_FROZEN, FLOOR, RecordRow
from moegate.report.numbers import is_peer, label, models, share_of_floor, speed_up, time_of

_GRID = "rgba(128,128,128,0.25)"
# Okabe and Ito's colours, which readers with colour blindness can distinguish, on light and dark. There is one symbol
# more than colours, so that contestants of one colour have different symbols; moegate's two lines differ by the dash.
_OURS, _NO_ROUTER = "#d55e00", "#999999"
_COLOURS = ("#3a93d0", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8c6bb1", "#b07d4f")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
_TIMES = [digit * 10.0**power for power in range(-1, 5) for digit in (1, 2, 5)]
_MARGIN = {"l": 56, "r": 12, "t": 16, "b": 48}


def time_by_tokens(rows: list[RecordRow], names: list[str]) -> go.Figure:
    """Lines of one model in one way: microseconds by number of tokens, both on logarithmic axes.

    Args:
        rows: Of one model and way, by ascending number of tokens.
        names: All contestants of the page, so that a contestant has the same colour in each figure.
    """
    figure = go.Figure()
    own = {DEFAULT: _OURS, DEFAULT_NOT_FROZEN: _OURS, FLOOR: _NO_ROUTER}
    others = list(dict.fromkeys(label(name) for name in names if name not in own))
    for name in names:
        points = [(int(row["tokens"]), time) for row in rows if (time := time_of(row, name)) is not None]
        if not points:
            continue
        place = others.index(label(name)) if name not in own else 0
        colour = own.get(name, _COLOURS[place % len(_COLOURS)])
        dash = "dot" if name == FLOOR else "dash" if name == DEFAULT_NOT_FROZEN else "solid"
        figure.add_scatter(
            x=[tokens for tokens, _ in points],
            y=[time for _, time in points],
            name=label(name),
            mode="lines+markers",
            line={"color": colour, "width": 3 if name == DEFAULT else 1.5, "dash": dash},
            marker={"symbol": _SYMBOLS[place % len(_SYMBOLS)], "size": 8 if name == DEFAULT else 6},
            hovertemplate="%{y:.2f} µs at M = %{x}<extra>" + label(name) + "</extra>",
        )
    _plain(figure, "tokens", "µs a call")
    tokens = sorted({int(row["tokens"]) for row in rows})
    figure.update_xaxes(type="log", tickvals=tokens, ticktext=[str(count) for count in tokens])
    figure.update_yaxes(type="log", tickvals=_TIMES, ticktext=[f"{time:g}" for time in _TIMES])
    figure.update_layout(height=480, legend={"orientation": "h", "yanchor": "top", "y": -0.24, "x": 0})
    return figure


def speed_ups(rows: list[RecordRow]) -> go.Figure:
    """A heat map of models and numbers of tokens: the best peer's time divided by moegate's."""
    shapes, tokens = models(rows), sorted({int(row["tokens"]) for row in rows})
    found: dict[tuple[str, int], tuple[str, float]] = {}
    for row in rows:
        ratio = speed_up(row)
        if ratio is not None:
            found[row["model"], int(row["tokens"])] = ratio
    grid: list[list[Any]] = [[found.get((model, count)) for count in tokens] for model in shapes]
    most = max((abs(math.log2(ratio)) for _, ratio in found.values()), default=1.0)
    figure = go.Figure(
        go.Heatmap(
            x=[str(count) for count in tokens],
            y=[_shape(rows, model) for model in shapes],
            z=[[None if each is None else math.log2(each[1]) for each in line] for line in grid],
            text=[["" if each is None else f"{each[1]:.2f}" for each in line] for line in grid],
            customdata=[["" if each is None else label(each[0]) for each in line] for line in grid],
            texttemplate="%{text}",
            textfont={"color": "#111111"},
            hovertemplate="%{text} times as fast as %{customdata}, M = %{x}<extra>%{y}</extra>",
            colorscale=[[0.0, "#f4a582"], [0.5, "#f0f0f0"], [1.0, "#7fc8a9"]],  # all light enough for dark figures
            zmin=-most,
            zmax=most,
            showscale=False,
            xgap=2,
            ygap=2,
        )
    )
    _plain(figure, "tokens", "")
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(autorange="reversed", showgrid=False, automargin=True)
    figure.update_layout(height=110 + 44 * len(shapes))
    return figure


def floor_shares(rows: list[RecordRow]) -> go.Figure:
    """A line a model: the floor's time divided by moegate's."""
    figure = go.Figure()
    for place, model in enumerate(models(rows)):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: int(row["tokens"]))
        points = [(int(row["tokens"]), share) for row in own if (share := share_of_floor(row)) is not None]
        if points:
            figure.add_scatter(
                x=[tokens for tokens, _ in points],
                y=[share for _, share in points],
                name=model,
                mode="lines+markers",
                line={"color": _COLOURS[place % len(_COLOURS)], "width": 2},
                marker={"symbol": _SYMBOLS[place % len(_SYMBOLS)], "size": 7},
                hovertemplate="%{y:.0%} at M = %{x}<extra>" + model + "</extra>",
            )
    _plain(figure, "tokens", "floor / moegate")
    tokens = sorted({int(row["tokens"]) for row in rows})
    figure.update_xaxes(type="log", tickvals=tokens, ticktext=[str(count) for count in tokens])
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    legend = {"orientation": "h", "yanchor": "top", "y": -0.24, "x": 0}
    figure.update_layout(height=400, showlegend=True, legend=legend)
    return figure


def plotted(rows: list[RecordRow]) -> list[str]:
    """The contestants that the lines show: moegate, its peers and the floor, moegate first."""
    names = dict.fromkeys(name for row in rows for name in row["contestants"])
    shown = [name for name in names if is_peer(name) or name in (DEFAULT_NOT_FROZEN, FLOOR)]
    return [DEFAULT, *shown]


def _shape(rows: list[RecordRow], model: str) -> str:
    row = next(row for row in rows if row["model"] == model)
    return f"{model}<br><sub>{row['hidden_size']} → {row['gate_rows']}, top {row['top_k']}</sub>"


def _plain(figure: go.Figure, x: str, y: str) -> None:
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin=_MARGIN,
        font={"family": "system-ui, sans-serif", "size": 13},
        xaxis={"title": x, "gridcolor": _GRID, "zeroline": False},
        yaxis={"title": y, "gridcolor": _GRID, "zeroline": False},
        hovermode="closest",
    )
