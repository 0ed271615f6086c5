"""The figures of a study's page: curves against a budget, and measures against the levels of a factor, with bands."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmezo.studies.charts import AXES, Chart, Trace, house_layout, line
from fedmezo.studies.compare.charts import colours, curve_charts
from fedmezo.studies.compare.curves import Point
from fedmezo.studies.suite.cells import matches
from fedmezo.studies.suite.measures import measure, unit_of
from fedmezo.studies.suite.records import Record
from fedmezo.studies.suite.statistics import Effect, effect_of
from fedmezo.studies.suite.study import Figure

__all__ = ["charts_of"]

_BAND = "Line: mean over the seeds; band: 95 % interval of the mean."
_WHISKERS = "Mark: mean over the seeds; whiskers: 95 % interval of the mean."
_NAMES = {"": "all"}


def charts_of(figure: Figure, records: Sequence[Record], *, at: int) -> list[Chart]:
    """Returns the charts of one figure, one for each panel; none without records.

    Args:
      figure: what to draw.
      records: of its study, at one scale.
      at: the figure's number on the page; part of the charts' ids.
    """
    drawn = [r for r in records if r.grid == figure.grid and matches(r.levels, figure.only) and not r.error]
    panels = _grouped(drawn, figure.panels)
    found: list[Chart] = []
    for place, (panel, listed) in enumerate(panels.items()):
        title = f"{figure.title}, {panel}" if panel and len(panels) > 1 else figure.title
        one = _Panel(figure, title, f"f{at}-{place}", _grouped(listed, figure.lines))
        found += one.curves() if figure.kind == "curves" else one.levels()
    return found


def _grouped(records: Sequence[Record], factors: Sequence[str]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(", ".join(_named(record, factor) for factor in factors), []).append(record)
    return groups


def _named(record: Record, factor: str) -> str:
    """Returns a level for people; a number says of what."""
    level = record.levels.get(factor, "")
    return f"{factor} {level}" if _is_number(level) else level


@dataclass(frozen=True)
class _Panel:
    """One chart: its title, its id and the records of each line."""

    figure: Figure
    title: str
    id: str
    groups: Mapping[str, Sequence[Record]]

    @property
    def colours(self) -> dict[str, str]:
        return colours([_NAMES.get(name, name) for name in self.groups])

    def curves(self) -> Iterator[Chart]:
        """Yields the loss against a budget; other budgets can be chosen on the page."""
        curves = {_NAMES.get(name, name): [_points(r) for r in listed] for name, listed in self.groups.items()}
        logs = ["y"] if "y" in self.figure.log else []
        for chart in curve_charts(curves, column=self.id, axis=self.figure.x, named=self.colours):
            if chart.id.endswith("-loss"):
                axis: Any = chart.layout["yaxis"]
                y = {**axis, **({"type": "log"} if logs else {})}
                yield Chart(
                    _slug(chart.id), f"{self.title}: {chart.title[0].lower()}{chart.title[1:]}", chart.traces,
                    {**chart.layout, "yaxis": y}, chart.key, chart.note,
                )  # fmt: skip

    def levels(self) -> Iterator[Chart]:
        """Yields a measure against a factor's levels, which are numbers or names."""
        levels = list(dict.fromkeys(r.levels.get(self.figure.x, "") for group in self.groups.values() for r in group))
        numbers = all(map(_is_number, levels))
        traces: list[Trace] = []
        for name, listed in self.groups.items():
            seen = _effects(listed, self.figure)
            traces += _lines(_NAMES.get(name, name), seen, colour=self.colours[_NAMES.get(name, name)], numbers=numbers)
        if not traces:
            return
        key = tuple(self.colours.items()) if len(self.groups) > 1 else ()
        note = _BAND if numbers else _WHISKERS
        title = f"{self.title}: {unit_of(self.figure.measure)[0].lower()}{unit_of(self.figure.measure)[1:]}"
        yield Chart(_slug(self.id), title, traces, self._layout(levels, numbers=numbers), key, note)

    def _layout(self, levels: Sequence[str], *, numbers: bool) -> dict[str, object]:
        layout = house_layout(self.figure.x, y={"type": "log"} if "y" in self.figure.log else {}, height=340)
        x: dict[str, object] = {"title": {"text": self.figure.x}, "fixedrange": True, "zeroline": False}
        if numbers:
            x |= {"tickvals": sorted(map(float, levels)), "tickformat": "~g"}
            x |= {"type": "log"} if "x" in self.figure.log else {}
        else:
            x |= {"type": "category", "categoryarray": list(levels), "automargin": True}
        return layout | {"xaxis": x, "hovermode": "closest"}


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", text.lower())


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _points(record: Record) -> list[Point]:
    """Returns the evaluations of a record as the comparison's charts take them."""
    return [
        Point(
            {axis: float(point.get(axis) or 0) for axis in AXES},
            {name: math.nan if value is None else float(value) for name, value in point.items() if name not in AXES},
        )
        for point in record.points
    ]


def _effects(records: Sequence[Record], figure: Figure) -> dict[str, Effect]:
    """Returns level -> the measure's mean over all records with that level, with its interval."""
    values: dict[str, list[float]] = {}
    for record in records:
        values.setdefault(record.levels.get(figure.x, ""), []).append(measure(record, figure.measure))
    found = {level: effect_of(listed) for level, listed in values.items()}
    return {level: effect for level, effect in found.items() if effect.seeds}


def _lines(name: str, seen: Mapping[str, Effect], *, colour: str, numbers: bool) -> Iterator[Trace]:
    """Yields the band and the line of one group; names have marks with whiskers instead of a band."""
    pairs: list[tuple[Any, Effect]] = [(float(level) if numbers else level, effect) for level, effect in seen.items()]
    if numbers:
        pairs.sort(key=lambda pair: pair[0])
    x, y = [at for at, _ in pairs], [effect.mean for _, effect in pairs]
    low, high = ([getattr(e, end) if math.isfinite(e.low) else e.mean for _, e in pairs] for end in ("low", "high"))
    if numbers and len(x) > 1:
        look: dict[str, Any] = {"mode": "lines", "hoverinfo": "skip", "width": 0}
        yield line(name, x, low, colour=colour, **look)
        yield line(name, x, high, colour=colour, fill="tonexty", fillcolor=f"{colour}2e", **look)
        yield line(name, x, y, colour=colour, hovertemplate="%{x}: %{y:.4g}")
        return
    ends = {"array": [h - m for h, m in zip(high, y, strict=True)]}
    ends |= {"arrayminus": [m - b for m, b in zip(y, low, strict=True)]}
    whiskers = {**ends, "type": "data", "symmetric": False, "color": colour, "thickness": 1.4, "width": 5}
    marks = line(name, x, y, colour=colour, mode="markers", error_y=whiskers, hovertemplate="%{x}: %{y:.4g}")
    yield {**marks, "marker": {"size": 9, "color": colour}}
