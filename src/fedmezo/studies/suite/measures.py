"""From a record to one number, by name.

    end              evaluation loss after the last round, nats
    area             mean evaluation loss over the run (trapezes over rounds), nats
    drop             first loss less last, nats
    at:AXIS:AMOUNT   loss when so much was spent, by interpolation, nats; AXIS as in a budget
    surged           1 when the loss ever stood 0.25 nats above its lowest before, or was not finite; else 0
    calm             share of the rounds before that happened; 1 when it never did
    level:NAME       the level of a factor, as a number
    metric:NAME      another metric of the last evaluation
    minus:NAME       the same with its sign changed, for metrics of which more is better
    NAME             a diagnostic of the record's values

Losses count at most one nat above the start: so one run that surged does not decide a mean of several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from fedmezo.errors import ConfigError
from fedmezo.studies.suite.records import Record

__all__ = ["SURGE", "UNITS", "measure", "surge_at", "unit_of"]

SURGE = 0.25  # nats above the lowest loss before
_MOST = 1.0  # nats above the start that a loss counts

UNITS: Mapping[str, str] = {
    "end": "Final evaluation loss (nats)",
    "area": "Mean evaluation loss over the run (nats)",
    "drop": "Fall of the evaluation loss (nats)",
    "surged": "Share of runs that surged",
    "calm": "Share of the rounds before the loss surged",
    "metric:rouge_l": "Mean Rouge-L",
    "dim": "Trained scalars",
    "update2_first": "Squared length of the first round's update",
    "norm_lora_A": "Length of A",
    "norm_lora_B": "Length of B",
    "moved": "Share of the scalars that ever moved",
    "extra_mb": "Memory over the loaded model (MB)",
    "peak_mb": "Peak memory of the process (MB)",
    "net_mb": "Weights, adapter and work (MB)",
    "model_mb": "Weights of the model (MB)",
    "rank": "Effective rank",
    "measured": "Mean squared gradient",
    "over_printed": "Measured over what is printed",
    "mean_total_variation": "Total variation from everyone's labels, mean over clients",
    "apart2": "Squared distance of clients' gradients from their mean",
    "error_over_signal": "Error of a slope over its signal",
    "up_per_client_round": "Bytes a client sends in a round",
}


def unit_of(name: str) -> str:
    """Returns a measure for people, with its unit."""
    if name.startswith("at:"):
        _, axis, amount = name.split(":")
        return f"Evaluation loss after {float(amount):,.0f} {axis} (nats)"
    return UNITS.get(name, name.rpartition(":")[2].replace("_", " "))


def measure(record: Record, name: str) -> float:
    """Returns one number of a record; nan when the record has an error or lacks it."""
    if record.error:
        return math.nan
    if name in _OF_CURVES:
        return _OF_CURVES[name](record) if record.points else math.nan
    head, _, rest = name.partition(":")
    if head == "at":
        axis, _, amount = rest.partition(":")
        return _at(record, axis, amount=float(amount))
    if head == "level":
        return _number(record.levels.get(rest))
    if head in ("metric", "minus"):
        last = _number(record.points[-1].get(rest)) if record.points else math.nan
        return last if head == "metric" else -last
    if rest:
        raise ConfigError(f"There is no measure {name!r}; the module measures tells which there are.")
    return _number(record.values.get(name))


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def _losses(record: Record) -> list[float]:
    """Returns the losses of the evaluations, those that were not finite as inf."""
    found = [_number(point.get("loss")) for point in record.points]
    return [loss if math.isfinite(loss) else math.inf for loss in found]


def _counted(record: Record) -> list[float]:
    losses = _losses(record)
    return [min(loss, losses[0] + _MOST) for loss in losses]


def _spent(record: Record, axis: str) -> list[float]:
    return [_number(point.get(axis)) for point in record.points]


def _area(record: Record) -> float:
    x, y = _spent(record, "rounds"), _counted(record)
    whole = x[-1] - x[0]
    parts = zip(pairwise(x), pairwise(y), strict=True)
    return sum((b - a) * (u + v) / 2 for (a, b), (u, v) in parts) / whole if whole > 0 else math.nan


def _at(record: Record, axis: str, *, amount: float) -> float:
    """Returns the loss at an amount spent, between evaluations by a straight line; nan beyond the last one."""
    x, y = _spent(record, axis), _counted(record) if record.points else []
    for (a, b), (u, v) in zip(pairwise(x), pairwise(y), strict=True):
        if a <= amount <= b:
            return u + (v - u) * (amount - a) / (b - a) if b > a else v
    return math.nan


def surge_at(losses: Sequence[float]) -> int | None:
    """Returns the place of the first loss that surged; None when none did."""
    lowest = math.inf
    for place, loss in enumerate(losses):
        if not math.isfinite(loss) or loss > lowest + SURGE:
            return place
        lowest = min(lowest, loss)
    return None


def _surged(record: Record) -> float:
    return float(surge_at(_losses(record)) is not None)


def _calm(record: Record) -> float:
    place = surge_at(_losses(record))
    return 1.0 if place is None else max(place - 1, 0) / max(len(record.points) - 1, 1)


_OF_CURVES: Mapping[str, Callable[[Record], float]] = {
    "end": lambda record: _counted(record)[-1],
    "area": _area,
    "drop": lambda record: _counted(record)[0] - _counted(record)[-1],
    "surged": _surged,
    "calm": _calm,
}
