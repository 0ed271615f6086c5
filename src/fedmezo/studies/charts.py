"""The figures of the run report, as plain Plotly figures: data in, JSON out. Only `plotly_script` needs plotly."""

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

from fedmezo.errors import missing
from fedmezo.studies.facts import OTHER, ClientRow, Facts, Row
from fedmezo.studies.page import AXES, PALETTE, dot, safe

__all__ = [
    "AXES",
    "MOST_LINES",
    "TITLES",
    "Chart",
    "Trace",
    "charts",
    "client_colour",
    "figures_html",
    "figures_json",
    "house_layout",
    "line",
    "plotly_script",
    "split_chart",
]

Trace = dict[str, object]
# More lines than this cannot be told apart: a band takes their place.
MOST_LINES = 12
# Invisible tick marks keep the labels off the first point.
_GAP = {"ticks": "outside", "ticklen": 5, "tickcolor": "rgba(0,0,0,0)"}
_MAX_CELLS_WITH_TEXT = 120


@dataclass(frozen=True)
class Chart:
    """One figure.

    Attributes:
      id: its element's id.
      title: what it shows, with the unit.
      traces: Plotly traces.
      layout: Plotly layout, on top of the house's.
      key: (label, colour) of each line; drawn as text above the chart.
      note: one sentence below the title; may be empty.
      wide: whether it takes the whole width of the page.
    """

    id: str
    title: str
    traces: Sequence[Trace]
    layout: Mapping[str, object]
    key: tuple[tuple[str, str], ...] = ()
    note: str = ""
    wide: bool = False


def plotly_script() -> str:
    """Returns Plotly's whole script, to be inlined.

    Raises:
      ConfigError: plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise missing("The report needs plotly", extra="report") from error
    return str(get_plotlyjs())


def client_colour(client: int) -> str:
    """Returns the colour of one client's line; it repeats after twelve clients, when lines give way to a band."""
    return PALETTE[1 + client % (len(PALETTE) - 1)]


def line(
    name: str, x: Sequence[float], y: Sequence[float], *, colour: str, width: float = 2.0, **more: object
) -> Trace:
    """Returns one line; `more` are Plotly's own settings of a trace."""
    mode = "lines" if sum(map(math.isfinite, y)) > 1 and len(y) > 40 else "lines+markers"
    look = {"color": colour, "width": width}
    trace = {
        "type": "scatter",
        "mode": mode,
        "name": html.escape(name),
        "x": list(x),
        "y": list(y),
        "cliponaxis": False,
    }
    return {**trace, "line": look, "marker": {"size": 5, "color": colour}, **more}


def house_layout(title: str, *, y: Mapping[str, object] | None = None, height: int = 300) -> dict[str, object]:
    """Returns the layout of all figures; `title` is the x axis', `y` Plotly's own settings of the y axis."""
    return {
        "height": height,
        "margin": {"l": 56, "r": 12, "t": 12, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "hovermode": "x unified",
        "font": {"family": "system-ui, sans-serif", "size": 12},
        "xaxis": {"title": {"text": title}, "zeroline": False, "rangemode": "tozero", "fixedrange": True, "nticks": 7},
        "yaxis": {"zeroline": False, "automargin": True, "fixedrange": True, "nticks": 6, **_GAP, **(y or {})},
    }


TITLES = {"loss": "Evaluation loss (nats)", "accuracy": "Answers right", "token_accuracy": "Answer tokens right"}


def charts(facts: Facts) -> dict[str, list[Chart]]:
    """Returns the charts of a run by section: evaluation, training, slopes, traffic; none without data."""
    if not facts.rows:
        return {"evaluation": [], "training": [], "slopes": [], "traffic": []}
    return {
        "evaluation": [chart for metric in TITLES if (chart := _evaluation(facts, metric))],
        "training": [_training(facts)] if not facts.privacy else [],  # in a private run nobody tells a loss
        "slopes": [*_slopes(facts), _rates(facts)],
        "traffic": [_traffic(facts)],
    }


def _evaluation(facts: Facts, metric: str) -> Chart | None:
    traces: list[Trace] = []
    key: list[tuple[str, str]] = []
    spent = facts.spent()
    for split in facts.splits[:MOST_LINES]:
        seen = [(at, m[metric]) for at, name, m in facts.evaluations if name == split and metric in m and at in spent]
        if not seen:
            continue
        colour = PALETTE[len(key) % len(PALETTE)]
        axes = {axis: [spent[at][axis] for at, _ in seen] for axis in AXES}
        traces.append(line(split, axes["rounds"], [value for _, value in seen], colour=colour, meta=axes))
        key.append((split, colour))
    y = {} if metric == "loss" else {"tickformat": ".0%", "rangemode": "tozero"}
    layout = house_layout(AXES["rounds"], y=y)
    return Chart(f"evaluation-{metric}", TITLES[metric], traces, layout, tuple(key)) if traces else None


def _done(rows: Sequence[Row]) -> list[int]:
    return [row.round + 1 for row in rows]


def _training(facts: Facts) -> Chart:
    title = "Training loss (nats)"
    losses = [row.loss for row in facts.rows]
    mean = line("mean of the cohort", _done(facts.rows), losses, colour=PALETTE[0], width=2.5)
    if len(facts.clients) > MOST_LINES:
        key = (("mean of the cohort", PALETTE[0]), ("middle 80 % of the clients", f"{PALETTE[0]}55"))
        return Chart("training-loss", title, [*_band(facts), mean], house_layout(AXES["rounds"]), key, wide=True)
    lines, named = _by_client(facts, lambda row: row.loss)
    named = [("mean", PALETTE[0]), *named]
    return Chart("training-loss", title, [*lines, mean], house_layout(AXES["rounds"]), tuple(named), wide=True)


def _by_client(facts: Facts, value: Callable[[ClientRow], float]) -> tuple[list[Trace], list[tuple[str, str]]]:
    """Returns a line for each client of whom anything is known, and its name and colour for the key."""
    lines, named = [], []
    for client in facts.clients:
        seen = [(row.round + 1, value(row.clients[client])) for row in facts.rows if client in row.clients]
        xs, ys = [at for at, _ in seen], [y for _, y in seen]
        if any(map(math.isfinite, ys)):
            lines.append(line(f"client {client}", xs, ys, colour=client_colour(client), width=1.2, opacity=0.7))
            named.append((f"client {client}", client_colour(client)))
    return lines, named


def _band(facts: Facts) -> list[Trace]:
    """Returns the 10 % and 90 % lines of the clients' losses and the area between; two clients at least."""
    finite = [(row.round + 1, [c.loss for c in row.clients.values() if math.isfinite(c.loss)]) for row in facts.rows]
    cuts = [(at, quantiles(losses, n=10, method="inclusive")) for at, losses in finite if len(losses) > 1]
    look: dict[str, Any] = {"colour": "rgba(0,0,0,0)", "width": 0, "mode": "lines"}
    x, low, high = [at for at, _ in cuts], [cut[0] for _, cut in cuts], [cut[-1] for _, cut in cuts]
    fill: dict[str, Any] = {"fill": "tonexty", "fillcolor": f"{PALETTE[0]}33"}
    return [
        line("10 % of the clients are below", x, low, **look),
        line("90 % of the clients are below", x, high, **look, **fill),
    ]


def _slopes(facts: Facts) -> list[Chart]:
    """Returns the chart of the slopes; none after backpropagation, which has no slopes."""
    x, rows = _done(facts.rows), facts.rows
    parts = (
        ("scale of the slopes", [row.scale for row in rows], PALETTE[0]),
        ("largest slope", [row.largest for row in rows], PALETTE[4]),
        ("clip in force", [row.clip for row in rows], PALETTE[1]),
    )
    shown = [(name, [y if y > 0 else math.nan for y in ys], colour) for name, ys, colour in parts]
    shown = [part for part in shown if any(map(math.isfinite, part[1]))]
    traces = [line(name, x, y, colour=colour, width=1.6) for name, y, colour in shown]
    layout = house_layout(AXES["rounds"], y={"type": "log", "exponentformat": "e"})
    note = "" if any(name == "clip in force" for name, *_ in shown) else "No clip was in force."
    title, key = "Slopes, absolute (nats per unit)", tuple((n, c) for n, _, c in shown)
    return [Chart("slopes", title, traces, layout, key, note)] if shown else []


def _rates(facts: Facts) -> Chart:
    x = _done(facts.rows)
    traces = [line("mean rate", x, [row.rate for row in facts.rows], colour=PALETTE[0])]
    key = [("mean rate", PALETTE[0])]
    differ = any(row.rates[1] - row.rates[0] > 1e-9 * row.rates[1] for row in facts.rows)
    if differ and len(facts.clients) <= MOST_LINES:
        lines, named = _by_client(facts, lambda row: row.rate)
        traces, key = [*lines, *traces], [*key, *named]
    elif differ:
        for at, name in enumerate(("lowest of the clients", "highest of the clients")):
            traces.append(line(name, x, [row.rates[at] for row in facts.rows], colour=PALETTE[at + 1], width=1.2))
            key.append((name, PALETTE[at + 1]))
    layout = house_layout(AXES["rounds"], y={"exponentformat": "e", "rangemode": "tozero"})
    return Chart("rate", "Learning rate", traces, layout, tuple(key))


def _traffic(facts: Facts) -> Chart:
    x, spent = _done(facts.rows), facts.spent()
    parts = [("sent by the clients", "up", PALETTE[0]), ("sent to the clients", "down", PALETTE[1])]
    if facts.dim and not facts.dense:
        parts.append(("each way, if the weights travelled", "dense", PALETTE[-2]))
    traces = [line(name, x, [spent[at - 1][field] for at in x], colour=colour) for name, field, colour in parts]
    layout = house_layout(AXES["rounds"], y={"type": "log", "tickformat": "~s", "ticksuffix": "B", "dtick": 1})
    key = tuple((name, colour) for name, _, colour in parts)
    return Chart("traffic", "Bytes on the wire, cumulative", traces, layout, key)


def split_chart(labels: Mapping[int, Mapping[str, float]], *, names: Sequence[str]) -> Chart:
    """Returns who has what: examples per client (rows) and category (columns, in the order of `names`)."""
    clients = sorted(labels)
    z = [[labels[client].get(name, 0) for name in names] for client in clients]
    # The rare labels share one column; its sums must not drown the others.
    named = [labels[client].get(name, 0) for client in clients for name in names if name != OTHER]
    few = len(clients) * len(names) <= _MAX_CELLS_WITH_TEXT
    trace: Trace = {
        "type": "heatmap",
        "x": [html.escape(name if len(name) < 25 else f"{name[:23]}…") for name in names],
        "y": [f"client {client}" for client in clients],
        "z": z,
        "zmin": 0,
        "zmax": max(named, default=0) or 1,
        "colorscale": [[0, f"{PALETTE[0]}00"], [1, PALETTE[0]]],
        "showscale": not few,
        "xgap": 2,
        "ygap": 2 if len(clients) <= 40 else 0,
        "hovertemplate": "%{y}, %{x}: %{z} examples<extra></extra>",
        **({"texttemplate": "%{z}"} if few else {}),
    }
    layout = house_layout(
        "", y={"autorange": "reversed", "showgrid": False, "nticks": 40}, height=min(90 + 30 * len(clients), 640)
    )
    x = {"type": "category", "automargin": True, "showgrid": False, "fixedrange": True}
    layout |= {"hovermode": "closest", "xaxis": x}
    return Chart("split", "Examples per client and category", [trace], layout)


def figures_html(shown: Sequence[Chart]) -> str:
    """Returns the places of the charts, each under its title and key; empty without charts."""
    if not shown:
        return ""
    drawn = []
    for chart in shown:
        key = "".join(dot(name, colour=colour) for name, colour in chart.key)
        note = f"<p class=note>{safe(chart.note)}</p>" if chart.note else ""
        caption = f"<figcaption><b>{safe(chart.title)}</b>{key}</figcaption>{note}"
        kind = " class=wide" if chart.wide else ""
        hole = f"<div class=chart id={chart.id}></div><noscript>Charts need JavaScript.</noscript>"
        drawn.append(f"<figure{kind}>{caption}{hole}</figure>")
    return f"<div class=figures>{''.join(drawn)}</div>"


def figures_json(shown: Sequence[Chart]) -> str:
    """Returns the charts as JSON that may stand inside a script element; numbers that are not finite become null."""
    figures = {chart.id: {"data": chart.traces, "layout": chart.layout} for chart in shown}
    return json.dumps(_finite(figures), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return (
        float(f"{value:.7g}")
        if isinstance(value, float) and math.isfinite(value)
        else None
        if isinstance(value, float)
        else value
    )
