"""The values of mu at which a slope is mostly signal, for one model, number format and data, from forward passes only.

The same slopes are taken at a ladder of mus. A slope at mu is s + eps n / mu + b mu^2: rounding of the losses, which is
divided by mu, and the bend, what the third derivative adds. Slopes along the same direction at two mus differ by these
two errors only, so the differences tell both, and no yardstick model is needed. A forward difference bends as mu.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Bench, Point
from fedmezo.models.bench import ModelBench
from fedmezo.studies.config import Config
from fedmezo.studies.curvature import Batch
from fedmezo.studies.moments import Array, fit_line
from fedmezo.zo.estimate import Estimator
from fedmezo.zo.noise import derive_seed, round_coefficient

__all__ = ["DIRECTIONS", "Rung", "Window", "customary_mu", "ladder", "measure_window", "spread_batches", "window_of"]

DIRECTIONS = 4
_TOLERATED = 1 / 3  # of the signal: such an error adds a ninth to a slope's square
_STEPS = 12  # to the decade, where the ends of a window are looked for
_REFITS = 30
_LEAST = 3  # rungs, to tell two errors from the signal


@dataclass(frozen=True, slots=True)
class Rung:
    """One mu of the ladder; root mean squares over directions, nats per parameter unit.

    Attributes:
      mu: half the distance between the two points.
      slope: what was seen; nan where a loss was not finite.
      rounding: its part that is rounding, as fitted.
      bend: its part that comes from the distance, as fitted.
      usable: whether the two errors together are at most a third of the signal.
    """

    mu: float
    slope: float
    rounding: float
    bend: float
    usable: bool


@dataclass(frozen=True)
class Window:
    """Where mu may lie.

    Attributes:
      lowest: the smallest usable mu between the ends of the ladder; None when there is none.
      highest: the largest; None likewise.
      best: the mu of the smallest error on the ladder; None when no slope was seen.
      signal: the slopes at the best rung less their error, root mean square; 0 when the error may be all of it.
      rounding: eps; the error at mu is eps / mu.
      bend: b; the error at mu is b mu^power.
      power: 2, or 1 for forward differences.
      reach: the largest mu up to which losses are finite and bend as told; inf beyond the ladder, 0 for no mu.
      forwards: forward passes it took.
      rungs: the ladder, ascending.
    """

    lowest: float | None
    highest: float | None
    best: float | None
    signal: float
    rounding: float
    bend: float
    power: int
    reach: float
    forwards: int
    rungs: tuple[Rung, ...]

    def error(self, mu: float) -> float:
        """Returns the root mean square error of a slope at `mu`, nats per parameter unit."""
        return math.hypot(self.rounding / mu, self.bend * mu**self.power)

    def holds(self, mu: float) -> bool:
        """Returns whether a slope at `mu`, on the ladder or beyond its ends, is mostly signal."""
        return self.signal > 0 and mu <= self.reach and self.error(mu) <= self.signal * _TOLERATED


def customary_mu(dtype: str) -> float:
    """Returns the mu that suits most models of a number format: 1e-3 for float32, 1e-2 for the 16-bit ones."""
    return 1e-3 if dtype == "float32" else 1e-2


def ladder(dtype: str) -> tuple[float, ...]:
    """Returns the mus worth trying in a number format, half a decade apart."""
    low = -4.0 if dtype == "float32" else -3.5
    return tuple(float(f"{10 ** (low + step / 2):.3g}") for step in range(6))


def spread_batches(clients: int, *, local_steps: int, count: int = DIRECTIONS) -> tuple[Batch, ...]:
    """Returns (client, round, step) of `count` different batches, of clients spread evenly over all."""
    stride = max(1, clients // count)
    return tuple((at * stride % clients, *divmod(at // clients, local_steps)) for at in range(count))


def window_of(config: Config, bench: ModelBench, *, directions: int = DIRECTIONS) -> Window:
    """Returns where mu may lie for a configuration's model and data, at the bench's parameters.

    Its forward passes are not counted among the bench's, which are a run's.

    Args:
      config: of the bench; its mu does not matter.
      bench: a model with data.
      directions: how many, each on a batch of its own.
    """
    federation, spent = config.federation, (bench.forwards, bench.tokens)
    window = measure_window(
        bench,
        batches=spread_batches(federation.clients, local_steps=federation.local_steps, count=directions),
        mus=ladder(config.model.dtype),
        seed=federation.seed,
        estimator=config.algorithm.estimator,
    )
    bench.forwards, bench.tokens = spent
    return window


def measure_window(
    bench: Bench,
    *,
    batches: Sequence[Batch],
    mus: Sequence[float],
    seed: int = 0,
    estimator: Estimator = "two-point",
) -> Window:
    """Returns the usable window of mu at the bench's parameters.

    All points go to the bench in one call, 2 per batch and mu, so that they share forward passes.

    Args:
      bench: its parameters are only read.
      batches: (client, round, step) of the batches, each with a direction of its own.
      mus: the ladder, at least three.
      seed: names the directions.
      estimator: whose slopes.

    Raises:
      ConfigError: too few mus, one that is not positive, or no batch.
    """
    if len(set(mus)) < _LEAST or not min(mus) > 0 or not batches:
        raise ConfigError(f"A window needs a batch and three mus above 0, got {len(batches)} and {list(mus)}.")
    # What the noise is multiplied by; the divisor must be the same number.
    rungs = [round_coefficient(mu) for mu in sorted(set(mus))]
    points = [
        Point(bench.params, derive_seed("window", seed, number), offset, *batch)
        for number, batch in enumerate(batches)
        for offset in ([-mu for mu in rungs] if estimator == "two-point" else [0.0]) + rungs
    ]
    losses = np.array(bench.losses(points), dtype=np.float64).reshape(len(batches), -1)
    above, below = losses[:, -len(rungs) :], losses[:, : -len(rungs)]
    distances = np.array(rungs) * (2 if estimator == "two-point" else 1)
    slopes = (above - below) / distances
    return _window(slopes.T, rungs, paired=estimator == "two-point", forwards=len(points))


def _window(slopes: Array, rungs: list[float], *, paired: bool, forwards: int) -> Window:
    """Returns the window that slopes of shape (rungs, directions) show."""
    finite = int(np.cumprod(np.isfinite(slopes).all(1)).sum())
    seen = np.full(len(rungs), math.nan)
    seen[:finite] = np.sqrt((slopes[:finite] ** 2).mean(1))
    kept, rounding, bend = _fit(slopes[:finite], rungs, paired=paired)
    power, reach = 2 if paired else 1, math.inf if kept == len(rungs) else rungs[kept - 1] if kept else 0.0
    blank = Window(None, None, None, 0.0, rounding, bend, power, reach, forwards, ())
    if kept < 2 or not seen[:kept].any():
        return replace(blank, rungs=_rows(blank, rungs, seen))
    at = _calmest(rungs[:kept], rounding=rounding, bend=bend, power=power)
    signal = math.sqrt(max(0.0, float(seen[at]) ** 2 - blank.error(rungs[at]) ** 2))
    whole = replace(blank, best=_best(blank, rungs[:kept]), signal=signal)
    count = 1 + math.ceil(_STEPS * math.log10(rungs[-1] / rungs[0]))
    tried = sorted([*np.geomspace(rungs[0], rungs[-1], count).tolist()[1:-1], *rungs, whole.best])
    good = [mu for mu in tried if whole.holds(mu)]
    lowest, highest = (good[0], good[-1]) if good else (None, None)
    return replace(whole, lowest=lowest, highest=highest, rungs=_rows(whole, rungs, seen))


def _rows(window: Window, rungs: Sequence[float], seen: Array) -> tuple[Rung, ...]:
    return tuple(
        Rung(mu, float(slope), window.rounding / mu, window.bend * mu**window.power, window.holds(mu))
        for mu, slope in zip(rungs, seen, strict=True)
    )


def _best(window: Window, rungs: Sequence[float]) -> float:
    """Returns the mu of the smallest error between the ends of the ladder; its middle where no error shows."""
    if not window.bend:
        return rungs[-1] if window.rounding else rungs[len(rungs) // 2]
    power = window.power
    ideal: float = (window.rounding**2 / (power * window.bend**2)) ** (1 / (2 * power + 2))
    return min(max(ideal, rungs[0]), rungs[-1])


def _calmest(rungs: Sequence[float], *, rounding: float, bend: float, power: int) -> int:
    """Returns the place of the rung with the smallest error."""
    return min(range(len(rungs)), key=lambda at: math.hypot(rounding / rungs[at], bend * rungs[at] ** power))


def _fit(slopes: Array, rungs: Sequence[float], *, paired: bool) -> tuple[int, float, float]:
    """Returns how many rungs follow the law of the two errors, eps and b.

    Where the bend exceeds the signal the loss has left the reach of its Taylor series, and slopes there stay behind
    mu^2, which passes for rounding. Such rungs are left out from the top; what they told of b was too little.
    """
    kept, power = len(slopes), 2 if paired else 1
    rounding, bend = _errors(slopes, rungs, paired=paired)
    while kept > _LEAST:
        at = _calmest(rungs[:kept], rounding=rounding, bend=bend, power=power)
        if (bend * rungs[kept - 1] ** power) ** 2 <= (slopes[at] ** 2).mean():
            break
        kept -= 1
        rounding, again = _errors(slopes[:kept], rungs, paired=paired)
        bend = max(bend, again)
    return kept, rounding, bend


def _errors(slopes: Array, rungs: Sequence[float], *, paired: bool) -> tuple[float, float]:
    """Returns eps and b of the slopes, (rungs, directions), by non-negative least squares on their differences.

    The mean squared difference of the slopes at mu and nu is eps^2 (1/mu^2 + 1/nu^2) + b^2 (mu^p - nu^p)^2. These span
    decades, and their spread is in proportion to their size. Weights from the differences themselves would favour those
    that happen to be small, so each fit is weighted by the last one's values.
    """
    pairs = list(combinations(range(len(slopes)), 2))
    apart = np.array([((slopes[low] - slopes[high]) ** 2).mean() for low, high in pairs])
    if not apart.any():
        return 0.0, 0.0
    low, high = (np.array([rungs[pair[side]] for pair in pairs]) for side in (0, 1))
    noise = 1 / low**2 + 1 / high**2
    if not paired:
        # All slopes of a direction share the loss in the middle; eps is still the error of one slope times mu.
        noise = (noise + (1 / low - 1 / high) ** 2) / 2
    bent = (high**2 - low**2) ** 2 if paired else (high - low) ** 2
    fitted = np.maximum(apart, apart[apart > 0].min())
    rounding = bend = np.zeros(())
    for _ in range(_REFITS):
        bend, rounding = fit_line(bent / noise, apart / noise, weights=(noise / fitted) ** 2)
        fitted = rounding * noise + bend * bent
    return math.sqrt(float(rounding)), math.sqrt(float(bend))
