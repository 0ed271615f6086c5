"""Straight lines through a grid's levels: what one more parameter costs, and what that says of models not measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedmezo.studies.suite.measures import measure
from fedmezo.studies.suite.records import Record
from fedmezo.studies.suite.statistics import Effect, effect_of, foretold, line_of
from fedmezo.studies.suite.study import Slope

__all__ = ["Row", "rows_of"]

_MB = 1e6


@dataclass(frozen=True)
class Row:
    """One line of a slope's table; every effect is over the seeds' own lines.

    Attributes:
      label: which levels it is about.
      slope: bytes per parameter.
      missed: memory foretold at the largest model, by the line through the smaller ones, over that measured, less one.
      ahead: model -> memory by the line through all of them, MB.
      sizes: how many models the line goes through.
    """

    label: str
    slope: Effect
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
        seeds = [points for points in by_seed.values() if len({x for x, _ in points}) > 1]
        if seeds:
            lines = [line_of([x for x, _ in points], [y for _, y in points]) for points in seeds]
            yield Row(
                label,
                effect_of([each * _MB for _, each in lines]),
                effect_of([foretold(points) - 1 for points in seeds]),
                {name: effect_of([fixed + each * x * _MB for fixed, each in lines]) for name, x in slope.ahead.items()},
                max(map(len, seeds)),
            )
