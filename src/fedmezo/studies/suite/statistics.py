"""Effects with their intervals, and how one is decided; docs/studies/protocol.md has the same in words.

An effect is a mean over paired seeds with its 95 % t interval. A test is answered yes, no or open.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import linear_regression
from typing import Literal

from fedmezo.studies.compare.verdicts import paired_interval
from fedmezo.studies.moments import spearman

__all__ = [
    "Answer", "Effect", "Word", "alike", "effect_of", "foretold", "line_of", "lower", "no_worse", "ranked", "slope_of",
    "summed_up", "trend", "within",
]  # fmt: skip

Answer = Literal["yes", "no", "open"]
Word = Literal["holds", "holds in part", "does not hold", "not testable at this scale"]


@dataclass(frozen=True)
class Effect:
    """A mean over seeds.

    Attributes:
      mean: nan without any value.
      low: lower end of the 95 % t interval; minus infinity for a single value.
      high: upper end.
      seeds: how many values.
    """

    mean: float
    low: float
    high: float
    seeds: int


def effect_of(values: Sequence[float]) -> Effect:
    """Returns the effect of one value per seed; those that are not finite are left out."""
    known = [value for value in values if math.isfinite(value)]
    return Effect(*paired_interval(known), len(known)) if known else Effect(math.nan, -math.inf, math.inf, 0)


def lower(effect: Effect, *, margin: float) -> Answer:
    """Returns whether a difference is below 0 and at least `margin` in size.

    yes: the interval is below 0 and the mean at most -margin. no: the interval is above -margin, so that a difference
    of that size is ruled out. open: neither.
    """
    if effect.high < 0 and effect.mean <= -margin:
        return "yes"
    return "no" if effect.low > -margin else "open"


def no_worse(effect: Effect, *, margin: float) -> Answer:
    """Returns whether a difference is not above `margin`.

    yes: the interval is below the margin. no: it is above 0 and the mean at least the margin. open: neither.
    """
    if effect.high < margin:
        return "yes"
    return "no" if effect.low > 0 and effect.mean >= margin else "open"


def alike(effect: Effect, *, margin: float) -> Answer:
    """Returns whether a difference is smaller than `margin` in size.

    yes: the interval lies within (-margin, margin). no: it leaves 0 out and the mean is at least `margin` in size.
    open: neither.
    """
    if -margin < effect.low and effect.high < margin:
        return "yes"
    return "no" if (effect.low > 0 or effect.high < 0) and abs(effect.mean) >= margin else "open"


def within(effect: Effect, *, least: float, most: float) -> Answer:
    """Returns whether a number is in [least, most].

    yes: its interval is. no: its interval has no number in common with it. open: neither.
    """
    if least <= effect.low and effect.high <= most:
        return "yes"
    return "no" if effect.high < least or effect.low > most else "open"


def trend(effect: Effect, *, least: float) -> Answer:
    """Returns whether a correlation is above 0 and at least `least`.

    yes: the interval is above 0 and the mean at least `least`. no: the interval is below `least`. open: neither.
    """
    if effect.low > 0 and effect.mean >= least:
        return "yes"
    return "no" if effect.high < least else "open"


def line_of(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Returns intercept and slope of the straight line y = a + b x by least squares; nan for less than two points."""
    if len(set(x)) < 2:
        return math.nan, math.nan
    slope, intercept = linear_regression(x, y)
    return intercept, slope


def foretold(points: Sequence[tuple[float, float]]) -> float:
    """Returns y at the largest x, by the straight line through all other points, over the y that is there; or nan."""
    *smaller, (x, y) = sorted(points)
    intercept, slope = line_of([a for a, _ in smaller], [b for _, b in smaller])
    return (intercept + slope * x) / y


def slope_of(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns the exponent of a power law y ~ x^p by least squares of the logarithms; nan for less than two points."""
    pairs = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and 0 < b < math.inf]
    return line_of([a for a, _ in pairs], [b for _, b in pairs])[1]


def ranked(x: Sequence[float], y: Sequence[float]) -> float:
    """Returns Spearman's rank correlation of the pairs that are known; nan for less than three or none that varies."""
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    found = spearman([a for a, _ in pairs], [b for _, b in pairs]) if len(pairs) > 2 else None
    return math.nan if found is None else found


def summed_up(answers: Sequence[Answer]) -> Word:
    """Returns the verdict of a claim from the answers of its tests.

    not testable at this scale: no test, or more than half of them open. holds: no "no". does not hold: no "yes".
    holds in part: both.
    """
    yes, no = answers.count("yes"), answers.count("no")
    if not answers or 2 * answers.count("open") > len(answers):
        return "not testable at this scale"
    if not no:
        return "holds"
    return "holds in part" if yes else "does not hold"
