"""The loss-surge guard: notices a run that is going up instead of down.

Every constant rate that learns fast surges some day, so the guard compares a median of three round losses with the
lowest one so far. The margin is six robust standard deviations of the round-to-round change, at least 15 % of the
level: client sampling alone moves a round's loss by less.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

from fedmezo.zo.estimate import robust_scale

__all__ = ["Guard", "OnSurge"]

OnSurge = Literal["warn", "halve", "rollback"]
_WINDOW = 3
_HISTORY = 64


@dataclass(frozen=True)
class Guard:
    """The losses of a run so far; frozen, `observe` returns the next one.

    Attributes:
      losses: (round, mean training loss) of recent finite rounds, newest last.
      floor: lowest median of three seen since the last surge; inf before three rounds.
      best: how many rounds were complete when the lowest loss around the floor was seen; where to roll back to.
    """

    losses: tuple[tuple[int, float], ...] = ()
    floor: float = math.inf
    best: int = 0

    def observe(self, round_number: int, loss: float) -> tuple["Guard", bool]:
        """Returns the guard after one round, and whether the loss has surged; it then starts afresh at that level."""
        if not math.isfinite(loss):
            return Guard(best=self.best), True
        losses = (*self.losses, (round_number, loss))[-_HISTORY:]
        if len(losses) < _WINDOW:
            return Guard(losses, self.floor, self.best), False
        level = median(value for _, value in losses[-_WINDOW:])
        if level > self.floor + self._margin(losses):
            return Guard(best=self.best), True
        if level < self.floor:
            # The loss of round k is that of the model with k rounds behind it.
            best, _ = min(losses[-_WINDOW:], key=lambda seen: seen[1])
            return Guard(losses, level, best), False
        return Guard(losses, self.floor, self.best), False

    def _margin(self, losses: tuple[tuple[int, float], ...]) -> float:
        before = losses[:-_WINDOW]
        changes = [later[1] - earlier[1] for earlier, later in pairwise(before)]
        return max(6 * robust_scale(changes), 0.15 * abs(self.floor))
