"""Straight lines through a grid's levels: what one more parameter costs, and what that says of models not measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedmezo.studies.suite.measures import measure
from fedmezo.studies.suite.records import Record
from fedmezo.studies.suite.statistics import Effect, effect_of, line_of
from fedmezo.studies.suite.study import Slope

__all__ = ["Row", "rows_of"]

_MB = 1e6


@dataclass(frozen=True)
class Row:
    """One line of a slope's table; every effect is over the seeds' own lines.

    Attributes:
      label: which levels it is about.
      slope: bytes per parameter.
      fixed: what no parameter has a part in, MB.
      missed: memory foretold at the largest model, by the line through the smaller ones, over that measured, less one.
      ahead: model -> memory by the line through all of them, MB.
      sizes: how many models the line goes through.
    """

    label: str
    slope: Effect
    fixed: Effect
    missed: Effect
    ahead: dict[str, Effect]
    sizes: int


def rows_of(slope: Slope, records: Sequence[Record], *, scale: str) -> Iterator[Row]:
    """Yields a row for each combination of the levels of `by` that has at least two models.

    Args:
      slope: what is fitted.
      records: of its study, at one scale.
      scale: of the records.
    """
    width = slope.weight_bytes.get(scale, 4)
    groups: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for record in records:
        if record.grid == slope.grid and not record.error:
            label = ", ".join(record.levels.get(factor, "") for factor in slope.by)
            parameters = measure(record, slope.weights) * _MB / width
            point = parameters, measure(record, slope.measure)
            groups.setdefault(label, {}).setdefault(record.seed, []).append(point)
    for label, by_seed in groups.items():
        fitted = [_Fit(sorted(points)) for points in by_seed.values() if len({x for x, _ in points}) > 1]
        if fitted:
            yield Row(
                label,
                effect_of([fit.slope * _MB for fit in fitted]),
                effect_of([fit.fixed for fit in fitted]),
                effect_of([fit.missed for fit in fitted]),
                {name: effect_of([fit.at(x * _MB) for fit in fitted]) for name, x in slope.ahead.items()},
                max(len(points) for points in by_seed.values()),
            )


class _Fit:
    """The line of one seed: MB over parameters."""

    def __init__(self, points: Sequence[tuple[float, float]]) -> None:
        self.fixed, self.slope = line_of([x for x, _ in points], [y for _, y in points])
        (x, y), smaller = points[-1], points[:-1]
        fixed, slope = line_of([x for x, _ in smaller], [y for _, y in smaller])
        self.missed = (fixed + slope * x) / y - 1 if math.isfinite(slope) else math.nan

    def at(self, parameters: float) -> float:
        """Returns the memory that the line foretells, MB."""
        return self.fixed + self.slope * parameters
