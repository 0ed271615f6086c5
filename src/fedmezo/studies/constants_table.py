"""Measured constants and clients' differences as tables for a terminal."""

import math
from collections.abc import Mapping

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedmezo.studies.heterogeneity import Heterogeneity
from fedmezo.studies.measured import Interval, Measured

__all__ = ["constants_table", "heterogeneity_table"]

_MEANINGS = {
    "smoothness": "L, largest over points",
    "effective_rank": "r = tr(H) / L, likewise",
    "c_g": "batches, Assumption 4",
    "sigma_g2": "batches, Assumption 4",
    "c_h": "clients, Assumption 6",
    "sigma_h2": "clients, Assumption 6",
}
# The signals of a client, in the order of `ClientSignals`.
_SHORT = {
    "examples": "examples",
    "loss": "loss",
    "gradient2": "|grad|^2",
    "apart2": "apart^2",
    "cosine": "cosine",
    "total_variation": "TV",
    "jensen_shannon": "JS",
}


def constants_table(measured: Measured) -> RenderableType:
    """Returns the constants with their intervals, then the points they come from.

    "-" stands for "has none"; "±" for the larger side of a 95 % interval.
    """
    table = _table("constant", "fitted", "95 %", "covers all", "meaning")
    for name, meaning in _MEANINGS.items():
        fitted, over = getattr(measured.constants, name), getattr(measured.covering, name)
        table.add_row(name, _number(fitted), _span(measured.intervals.get(name)), _number(over), meaning)
    points = _table("point", "|grad f|^2", "E|grad F|^2", "apart^2", "tr H", "L", "r")
    for row in measured.rows:
        sizes = ("gradient2", "batch2", "apart2", "trace", "norm", "rank")
        points.add_row(row.point, *(_with(getattr(row, name), row.intervals, name) for name in sizes))
    cost = Text(f"\n{measured.constants.dim:,} trained numbers, {measured.forwards:,} forward passes.")
    return Group(table, Text(), points, cost)


def heterogeneity_table(found: Heterogeneity) -> RenderableType:
    """Returns one line per client, the fit of Assumption 6, and which signals agree."""
    table = _table("client", *_SHORT.values())
    for row in found.clients:
        told = (_with(value, row.intervals, name) for name, value in row.signals().items() if name in row.intervals)
        distances = (_number(row.total_variation), _number(row.jensen_shannon))
        table.add_row(str(row.client), f"{row.examples:,}", *told, *distances)
    sums = {"|grad f|^2": "gradient2", "apart^2": "apart2", "c_h": "c_h", "sigma_h2": "sigma_h2"}
    said = [f"{words} = {_with(getattr(found, name), found.intervals, name)}" for words, name in sums.items()]
    alike = _table("signal", *_SHORT.values())
    for name, others in found.correlations.items():
        alike.add_row(_SHORT[name], *(_number(others.get(other)) for other in _SHORT))
    whole = f"At the start: {said[0]}, {said[1]} (mean over clients). Distances of labels by {found.labels}."
    words = f"\n{whole}\nAssumption 6 over {found.points} points: {said[2]}, {said[3]}.\n\nRank correlations:"
    return Group(table, Text(words), alike)


def _table(*titles: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for at, title in enumerate(titles):
        table.add_column(title, justify="left" if at == 0 or title == "meaning" else "right", no_wrap=True)
    return table


def _with(value: float | None, intervals: Mapping[str, Interval], name: str) -> str:
    """Returns a value with the larger side of its interval, "8.8 ±5.5"; --json has both sides."""
    low, high = intervals.get(name, (math.nan, math.nan))
    side = math.nan if value is None else max(value - low, high - value)
    return _number(value) if math.isnan(side) else f"{_number(value)} ±{side:.2g}"


def _span(interval: Interval | None) -> str:
    known = interval is not None and not any(map(math.isnan, interval))
    return f"{_number(interval[0])} to {_number(interval[1])}" if known and interval else "-"


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.3g}"
