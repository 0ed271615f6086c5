"""The arithmetic of a falling or rising loss: levels that single rounds do not move, and a trend with its interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np

from fedmezo.zo.estimate import robust_scale

__all__ = ["Rise", "Trend", "levels", "rise", "trend", "window"]

_MARGIN = 6.0
_LEAST = 0.05
_SURE = 1.5  # times the 95 % interval is one of 99.7 %


def window(count: int) -> int:
    """Returns how many rounds a level is the median of: three, and in long runs a fifth of them, at most nine."""
    return max(3, min(9, count // 5))


def levels(values: Sequence[float]) -> list[float]:
    """Returns the running medians of `values`, the first of the first window; empty when there is no full window."""
    size = window(len(values))
    return [float(median(values[end - size : end])) for end in range(size, len(values) + 1)]


@dataclass(frozen=True)
class Rise:
    """How far a course is above its lowest level.

    Attributes:
      floor: the lowest level.
      last: the last level.
      margin: what scatter explains.
      best: place of the lowest value in the floor's window.
      began: place of the first value from which on every level is above the floor by half the margin.
    """

    floor: float
    last: float
    margin: float
    best: int
    began: int

    @property
    def real(self) -> bool:
        """Whether the course ends higher than scatter explains."""
        return self.last > self.floor + self.margin


def rise(values: Sequence[float]) -> Rise | None:
    """Returns where a course has its lowest level and how far above it ends; None for fewer than four values.

    The margin is six robust scales of the changes from one value to the next, over the root of the window, and at least
    5 % of the floor. In pure noise the last level is above the lowest by more in less than one run of a hundred, for 6
    to 500 values, normal or heavy-tailed.
    """
    if len(values) < 4:
        return None
    seen, size = levels(values), window(len(values))
    low = min(range(len(seen)), key=seen.__getitem__)
    scatter = robust_scale([later - earlier for earlier, later in pairwise(values)])
    margin = max(_MARGIN * scatter / math.sqrt(size), _LEAST * abs(seen[low]))
    above = len(seen)
    while above > low and seen[above - 1] > seen[low] + margin / 2:
        above -= 1
    best = min(range(low, low + size), key=values.__getitem__)
    return Rise(seen[low], seen[-1], margin, best, min(above + size // 2, len(values) - 1))


@dataclass(frozen=True)
class Trend:
    """The mean change of the loss per round.

    Attributes:
      slope: nats per round.
      low: lower end of its 95 % interval.
      high: upper end.
      noise: deviation of one client's loss in one round around its own course, nats.
      between: deviation of the clients' mean losses, nats.
      rounds: rounds it is from, first to last.
      visits: clients per round, on average.
      width: half the interval, in standard errors.
    """

    slope: float
    low: float
    high: float
    noise: float
    between: float
    rounds: int
    visits: float
    width: float

    @property
    def half(self) -> float:
        """Half the interval."""
        return self.high - self.slope

    @property
    def climbs(self) -> bool:
        """Whether the loss rises for sure: an interval of 99.7 % excludes no change."""
        return self.slope > _SURE * self.half

    def rounds_to_see(self, *, slope: float, noise: float = 1.0) -> float:
        """Returns how many rounds show a change of `slope` a round, with `noise` times the scatter; inf for none.

        The standard error of a trend over n rounds of m clients is scatter * sqrt(12 / (m n^3)).
        """
        if slope == 0:
            return math.inf
        ratio = self.width * self.noise * noise / slope
        return float((12 * ratio**2 / self.visits) ** (1 / 3))


def trend(courses: Mapping[int, Sequence[tuple[int, float]]]) -> Trend | None:
    """Returns the trend of many clients' losses; None when fewer than five changes of a client were seen.

    Least squares with a level for every client, so that it does not matter who was drawn when. The scatter is that of
    a client's loss from one of its rounds to its next (half their mean square): it is not moved by the trend's shape.
    The interval is Student's for as many degrees of freedom as there are changes.

    Args:
      courses: client -> (round, loss), finite, in the order of rounds.
    """
    known = {client: np.array(course, dtype=np.float64) for client, course in courses.items() if len(course) > 1}
    changes = np.concatenate([np.diff(course[:, 1]) for course in known.values()] or [np.zeros(0)])
    if len(changes) < 5:
        return None
    centred = np.concatenate([course - course.mean(axis=0) for course in known.values()])
    spread = float(np.sum(centred[:, 0] ** 2))
    noise = math.sqrt(float(np.mean(changes**2)) / 2)
    slope = float(np.sum(centred[:, 0] * centred[:, 1])) / spread
    # Student's 97.5 % point, within 2 % from five degrees of freedom on.
    width = 1.96 + 2.4 / len(changes) + 3 / len(changes) ** 2
    half = width * noise / math.sqrt(spread)
    times = np.concatenate([course[:, 0] for course in known.values()])
    means = [float(course[:, 1].mean()) for course in known.values()]
    rounds = int(times.max() - times.min()) + 1
    between = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    return Trend(slope, slope - half, slope + half, noise, between, rounds, len(times) / rounds, width)
