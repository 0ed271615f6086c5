"""How a run's evaluation went against what it had spent, read from the journal's plain columns.

The slopes are not decoded, so a journal that holds whole models is read as quickly as one that holds numbers.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fedmezo.runtime.sqlitefile import connect
from fedmezo.studies.charts import AXES
from fedmezo.studies.files import JOURNAL

__all__ = ["Band", "Point", "band", "read_curve"]

_ROUNDS = "SELECT round, forwards, tokens, COALESCE(seconds, 0) FROM rounds ORDER BY round"
_BYTES = "SELECT round, SUM(bytes_up + bytes_down) FROM replies GROUP BY round"
_JUDGED = "SELECT round, metric, value FROM evaluations WHERE split = 'eval' ORDER BY round"


@dataclass(frozen=True)
class Point:
    """One evaluation of a run.

    Attributes:
      spent: axis -> what had been spent by then.
      metrics: metric -> value; nan where the journal has none.
    """

    spent: Mapping[str, float]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Band:
    """The curves of an arm's seeds as one.

    Attributes:
      spent: axis -> mean over the seeds at each evaluation.
      mean: mean value at each evaluation.
      low: lowest value.
      high: highest value.
      seeds: number of curves.
    """

    spent: Mapping[str, Sequence[float]]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    seeds: int


def read_curve(folder: Path) -> list[Point]:
    """Returns the evaluations of a run, the untrained model first.

    Raises:
      JournalError: the journal cannot be read.
    """
    with closing(connect(folder / JOURNAL, readonly=True)) as db:
        rounds, judged = db.execute(_ROUNDS).fetchall(), db.execute(_JUDGED).fetchall()
        sent = dict(db.execute(_BYTES).fetchall())
    now = dict.fromkeys(AXES, 0.0)
    spent = {-1: dict(now)}
    for number, forwards, tokens, seconds in rounds:
        gain = {"rounds": 1, "forwards": forwards, "tokens": tokens, "seconds": seconds, "bytes": sent.get(number, 0)}
        now = {axis: now[axis] + gain[axis] for axis in AXES}
        spent[number] = now
    found: dict[int, dict[str, float]] = {}
    for number, metric, value in judged:
        found.setdefault(number, {})[metric] = math.nan if value is None else value
    return [Point(spent[number], metrics) for number, metrics in found.items() if number in spent]


def band(curves: Sequence[Sequence[Point]], metric: str) -> Band | None:
    """Returns the curves of one arm's seeds as a mean with its range; None when the metric is missing.

    Evaluations belong together when they come after the same number of rounds; the last ones do in any case, as a
    budget of tokens or seconds need not end every seed after the same round.
    """
    keyed = [_keyed(curve, metric) for curve in curves]
    shared = [key for key in (keyed[0] if keyed else {}) if all(key in points for points in keyed)]
    columns = [[points[key] for points in keyed] for key in shared]
    if not columns:
        return None
    values = [[point.metrics[metric] for point in column] for column in columns]
    return Band(
        spent={axis: [fmean(point.spent[axis] for point in column) for column in columns] for axis in AXES},
        mean=[fmean(column) for column in values],
        low=[min(column) for column in values],
        high=[max(column) for column in values],
        seeds=len(keyed),
    )


def _keyed(curve: Sequence[Point], metric: str) -> dict[float, Point]:
    """Returns the points that have the metric by their rounds; the last one's key is infinity."""
    known = [point for point in curve if math.isfinite(point.metrics.get(metric, math.nan))]
    return {math.inf if point is known[-1] else point.spent["rounds"]: point for point in known}
