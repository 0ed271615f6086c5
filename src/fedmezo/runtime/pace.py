"""Whether a run goes down, and at which rate: a few fixed batches of the clients, judged again and again.

The same batches before and after differ by what the model has learnt, not by the draw of examples, so six of them show
what the training loss of a round cannot. They serve twice. A loss that rose above the lowest one seen is a setback: the
run goes back to where it was lowest and takes shorter steps. And early in a run with `rate = "auto"` the update since
the last look is stretched, up to sixteen times its length: a line search along the way it goes. What drowns in noise
there counts little; the searches of a run that see nothing draw its rate towards four times its start.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev

from fedmezo.errors import JournalError

__all__ = ["Look", "Pace", "factor_of", "line", "lowest_on", "rose", "start_of", "stays_up"]

_CHECKS = 8
_EARLY = 0.35  # the share of a run in which its rate is set
_FARTHEST = 16.0
# What a rate leaves to the bend of the loss: a fifth at once, and the root of how much longer the run is than what was
# seen of it, because LoRA factors, and with them the bend, grow on the way.
_ROOM = 1.2
_MOST, _LEAST = 4.0, 0.25
# Where nothing is seen, neither gain nor harm, the searches of a run together multiply its rate by this; and how many
# squared standard errors a gain must have to count as much as that.
_UNSEEN, _SEEN = 4.0, 9.0
_BITS = 16  # factors have four significant bits, so that products of many are exact


@dataclass(frozen=True)
class Pace:
    """When to look, and what for.

    Attributes:
      rounds: rounds of the run, T.
      adapt: whether the rate is set by line searches early in the run.
    """

    rounds: int
    adapt: bool

    def sets_rate(self, done: int) -> bool:
        """Whether the rate is set after so many rounds: after 1, 2, 4, ... in the first third of the run."""
        return self.adapt and _early(done, self.rounds)

    def looks(self, done: int) -> bool:
        """Whether the batches are judged after so many rounds: early ones, eight times in a run, and at its end."""
        return done >= self.rounds or _early(done, self.rounds) or done % math.ceil(self.rounds / _CHECKS) == 0

    def passes(self, batches: int) -> int:
        """Returns the forward passes of a run without a surge, at most."""
        looks = 1 + sum(map(self.looks, range(1, self.rounds + 1)))
        return batches * (looks + 3 * sum(map(self.sets_rate, range(1, self.rounds + 1))))


def _early(done: int, rounds: int) -> bool:
    return done.bit_count() == 1 and done <= max(2, _EARLY * rounds)


@dataclass(frozen=True)
class Look:
    """What was seen so far.

    Attributes:
      at: rounds that were done at the last look.
      losses: of each batch then, nats.
      best: rounds that were done when the mean loss was lowest.
      lowest: of each batch then.
      forwards: forward passes all looks took.
      undone: rounds that were walked and taken back.
    """

    at: int
    losses: tuple[float, ...]
    best: int
    lowest: tuple[float, ...]
    forwards: int
    undone: int = 0

    def then(self, at: int, losses: Sequence[float], *, forwards: int) -> "Look":
        """Returns what is known after one more look."""
        better = mean(losses) < mean(self.lowest)
        best, lowest = (at, tuple(losses)) if better else (self.best, self.lowest)
        return Look(at, tuple(losses), best, lowest, self.forwards + forwards, self.undone)

    def back(self, done: int) -> "Look":
        """Returns what is known after a run of `done` rounds went back to its best one."""
        undone = self.undone + done - self.best
        return Look(self.best, self.lowest, self.best, self.lowest, self.forwards, undone)

    def to_json(self) -> str:
        """Returns the detail of a journal's event."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Look":
        """Returns what `to_json` wrote.

        Raises:
          JournalError: it is something else.
        """
        try:
            told = json.loads(text)
            lists = {name: tuple(map(float, told[name])) for name in ("losses", "lowest")}
            found = cls(**told | lists)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise JournalError(f"An event of the journal tells of no look ({error}); restore a copy of it.") from error
        if not all(type(number) is int for number in (found.at, found.best, found.forwards, found.undone)):
            raise JournalError("An event of the journal tells of a look without its numbers; restore a copy of it.")
        return found


def start_of(done: int, losses: Sequence[float]) -> Look:
    """Returns the first look of a run that has `done` rounds."""
    return Look(done, tuple(losses), done, tuple(losses), len(losses))


def mean(losses: Sequence[float]) -> float:
    """Returns the mean; inf where a loss is not finite."""
    return fmean(losses) if all(map(math.isfinite, losses)) else math.inf


def _error(some: Sequence[float], others: Sequence[float]) -> float:
    """Returns the standard error of the mean difference of paired losses."""
    gaps = [one - other for one, other in zip(some, others, strict=True)]
    return stdev(gaps) / math.sqrt(len(gaps)) if all(map(math.isfinite, gaps)) else math.inf


def stays_up(before: Sequence[float], losses: Sequence[float], lowest: Sequence[float]) -> bool:
    """Whether paired losses are above the lowest ones at two looks in a row.

    Each by 2 % of the level and 2 (1 + 3/n) standard errors: a slow rise shows at every look, chance seldom at two.
    """
    return all(_above(some, lowest, errors=2.0, share=0.02) for some in (before, losses))


def _above(losses: Sequence[float], lowest: Sequence[float], *, errors: float, share: float) -> bool:
    rise, few = mean(losses) - mean(lowest), errors * (1 + 3 / len(losses)) * _error(losses, lowest)
    return not (math.isfinite(rise) and rise <= max(few, share * abs(mean(lowest))))


def rose(losses: Sequence[float], lowest: Sequence[float]) -> bool:
    """Whether paired losses rose, or are not finite.

    A rise is 2 % of the level and 4 (1 + 3/n) standard errors of the mean gap, or 10 % and half as many errors: a dozen
    looks are compared with the lowest one, and n = 6 batches give a rough error, so chance often meets two. Even so,
    in simulation about 7 % of falling runs of a dozen looks meet at least one false alarm.
    """
    return _above(losses, lowest, errors=4.0, share=0.02) or _above(losses, lowest, errors=2.0, share=0.1)


def line(
    judge: Callable[[float], Sequence[float]], *, before: Sequence[float], after: Sequence[float]
) -> dict[float, tuple[float, ...]]:
    """Returns multiple of the last update -> losses: at 0, 1, 4, at 16 unless they rose by then, and between the best.

    The strides are wide because a short step drowns in the rounding of 16-bit arithmetic, where a long one shows where
    it leads.

    Args:
      judge: multiple -> losses of the model before the update plus so many times the update.
      before: losses at 0.
      after: losses at 1.
    """
    seen = {0.0: tuple(before), 1.0: tuple(after), 4.0: tuple(judge(4.0))}
    if not rose(seen[4.0], seen[0.0]) and not rose(seen[4.0], seen[1.0]):
        seen[_FARTHEST] = tuple(judge(_FARTHEST))
    best = min(seen, key=lambda at: (mean(seen[at]), at))
    between = 8.0 if best > 4 or (best == 4 and _FARTHEST in seen) else 2.0
    return seen | {between: tuple(judge(between))}


def lowest_on(points: Mapping[float, float]) -> float:
    """Returns where the parabola through the lowest point and its neighbours is lowest; only finite points count.

    Never beyond the farthest point; there, too, when the points fall without bending up. Of fewer than three points it
    is the lowest.
    """
    places = sorted(at for at, loss in points.items() if math.isfinite(loss))
    if len(places) < 3:
        return min(places, key=lambda at: points[at], default=1.0)
    middle = min(max(places.index(min(places, key=lambda at: (points[at], at))), 1), len(places) - 2)
    a, b, c = places[middle - 1 : middle + 2]
    left, mid, right = points[a], points[b], points[c]
    bend = (right - mid) / (c - b) - (mid - left) / (b - a)
    if bend <= 0:
        return places[-1] if points[places[-1]] < points[places[0]] else a
    slope = ((b - a) * (right - mid) / (c - b) + (c - b) * (mid - left) / (b - a)) / (c - a)
    return min(max(b - slope * (c - a) / (2 * bend), places[0]), places[-1])


def factor_of(seen: Mapping[float, Sequence[float]], *, done: int, rounds: int) -> float:
    """Returns what the rate is to be multiplied by, in [1/4, 4], from the losses along a line.

    The best multiple is divided by 1.2 (T / 3t)^(1/2), t of T rounds being done. Where the differences are within their
    noise, the factor is drawn towards 4^(1/n), n being the searches of the run, or towards 1 where the fourfold step
    rose. Its logarithm is the weighted mean of the measured one, with weight z^2 / (9 + z^2), and of that one: z is the
    distance of the lowest point to the model as it was, or of the model as it is where nothing is lower, in standard
    errors. That is a pull, no guarantee: on pure noise factors far from it still occur.
    """
    if not math.isfinite(mean(seen[0.0])):
        return 1.0
    best = lowest_on({at: mean(losses) for at, losses in seen.items()})
    lowest = min(seen, key=lambda at: (mean(seen[at]), at))
    other = lowest or 1.0
    gap, error = mean(seen[0.0]) - mean(seen[other]), _error(seen[other], seen[0.0])
    z = gap / error if math.isfinite(gap) and error > 0 else 1.0
    room = _ROOM * max(1.0, rounds / (3 * done)) ** 0.5
    weight = z * z / (_SEEN + z * z)
    searches = sum(_early(number, rounds) for number in range(1, rounds + 1))
    unseen = 1.0 if rose(seen.get(4.0, seen[0.0]), seen[0.0]) else _UNSEEN ** (1 / searches)
    weighed = unseen ** (1 - weight) * max(best / room, _LEAST / 2) ** weight
    return _rounded(min(max(weighed, _LEAST), _MOST))


def _rounded(factor: float) -> float:
    share, power = math.frexp(factor)
    return math.ldexp(round(share * _BITS) / _BITS, power)
