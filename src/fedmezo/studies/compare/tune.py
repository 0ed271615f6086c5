"""Choosing each arm's rate from a grid, on a seed and evaluation examples that are not reported.

The rate with the lowest final evaluation loss is taken. When it is the lowest or highest of its grid, the grid grows by
a step in that direction, twice at most, and the result says so.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmezo.studies.compare.runs import Outcome

__all__ = ["MOST_STEPS", "Tuning", "beyond", "tune"]

MOST_STEPS = 2
Tried = Mapping[float, float]


@dataclass
class Tuning:
    """One arm's search.

    Attributes:
      arm: its label.
      grid: the rates asked for, in order.
      outcomes: rate -> the run with it.
    """

    arm: str
    grid: tuple[float, ...]
    outcomes: dict[float, Outcome] = field(default_factory=dict)

    @property
    def losses(self) -> dict[float, float]:
        """Final evaluation loss by rate, in order of the rates; nan where the run failed."""
        return {rate: self.outcomes[rate].loss for rate in sorted(self.outcomes)}

    @property
    def rate(self) -> float | None:
        """The rate with the lowest loss, the lower one of two alike; None when every run failed."""
        known = [(loss, rate) for rate, loss in self.losses.items() if math.isfinite(loss)]
        return min(known)[1] if known else None

    def points(self) -> list[dict[str, Any]]:
        """Returns every rate tried, as plain values."""
        return [
            {
                "arm": self.arm,
                "rate": rate,
                "loss": loss if math.isfinite(loss) else None,
                "chosen": rate == self.rate,
                "added": rate not in self.grid,
                "seed": self.outcomes[rate].job.seed,
                "run_dir": str(self.outcomes[rate].job.folder),
                "error": self.outcomes[rate].error or None,
            }
            for rate, loss in self.losses.items()
        ]

    def notes(self) -> list[str]:
        """Returns what a reader must know of the search: a best rate at the edge, rates that failed."""
        found = []
        added = [rate for rate in self.losses if rate not in self.grid]
        still = beyond(self.losses) is not None
        if self.rate is None:
            found.append(f"{self.arm}: every rate of its grid failed, so it has no tuned runs; give lower rates.")
        elif added:
            lay, more = ("highest", "a higher") if max(added) > max(self.grid) else ("lowest", "a lower")
            found.append(
                f"{self.arm}: the best rate was the {lay} of its grid, so {_listed(added)} "
                f"{'was' if len(added) == 1 else 'were'} tried as well; {self.rate:g} was taken"
                + ("." if not still else f", which is at the edge still: {more} one may be better.")
            )
        failed = [rate for rate, loss in self.losses.items() if not math.isfinite(loss)]
        if failed and self.rate is not None:
            found.append(f"{self.arm}: the tuning run at rate {_listed(failed)} failed or diverged.")
        return found


def _listed(rates: Sequence[float]) -> str:
    return " and ".join(f"{rate:g}" for rate in rates)


def beyond(losses: Tried) -> float | None:
    """Returns the next rate outwards when the best one is the lowest or highest tried, else None.

    It is as far from the best as that is from its neighbour, as a ratio. A rate that failed counts as a rate tried.
    """
    rates = sorted(losses)
    known = [(loss, rate) for rate, loss in losses.items() if math.isfinite(loss)]
    if not known or len(rates) < 2:
        return None
    best = min(known)[1]
    if best == rates[-1]:
        return float(f"{best * best / rates[-2]:.6g}")
    if best == rates[0]:
        return float(f"{best * best / rates[1]:.6g}")
    return None


def tune(
    grids: Mapping[str, Sequence[float]], run: Callable[[Sequence[tuple[str, float]]], Sequence[Outcome]]
) -> list[Tuning]:
    """Returns each arm's search.

    Args:
      grids: rates by arm, in order.
      run: runs (arm, rate) pairs, all that are known at the time, and returns what became of them in their order.
    """
    found = {arm: Tuning(arm, tuple(grid)) for arm, grid in grids.items()}
    wanted = [(arm, rate) for arm, grid in grids.items() for rate in grid]
    for _ in range(1 + MOST_STEPS):
        for (arm, rate), outcome in zip(wanted, run(wanted) if wanted else (), strict=True):
            found[arm].outcomes[rate] = outcome
        steps = {arm: beyond(tuning.losses) for arm, tuning in found.items()}
        wanted = [(arm, rate) for arm, rate in steps.items() if rate is not None and rate > 0]
    return list(found.values())
