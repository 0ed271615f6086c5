"""Federated quadratics with planted constants, whose expectations are known exactly, to hold rates and bounds against.

Client i's loss is f_i(x) = x' A x / 2 - b_i' x. A mini-batch multiplies it by 1 + a or 1 - a and adds noise' x, so that
E|grad F_i|^2 = (1 + a^2) |grad f_i|^2 + d noise: Assumption 4 with equality. Directions are Gaussian and a two-point
slope is exact, so the first two moments of the weights follow from a recursion: nothing is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedmezo.theory.constants import Constants, Setting

__all__ = ["Array", "Quadratic", "average", "course", "plant"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Quadratic:
    """N clients that share their curvature.

    Attributes:
      spectrum: eigenvalues of A, in whose basis everything is told; shape (d,).
      pulls: b_i, shape (N, d).
      wobble: a.
      noise: variance per coordinate of what a batch adds.
    """

    spectrum: Array
    pulls: Array
    wobble: float = 0.0
    noise: float = 0.0

    @property
    def optimum(self) -> Array:
        """Where the mean loss is least."""
        mean: Array = self.pulls.mean(0) / self.spectrum
        return mean

    def gap(self, mean: Array, variance: Array) -> float:
        """Returns E f - f* of weights with this mean and variance per coordinate."""
        return float((self.spectrum * ((mean - self.optimum) ** 2 + variance)).sum() / 2)

    def gradient2(self, mean: Array, variance: Array) -> float:
        """Returns E|grad f|^2."""
        return float((self.spectrum**2 * ((mean - self.optimum) ** 2 + variance)).sum())

    def constants(self) -> Constants:
        """Returns the constants of Assumptions 1 to 6, all met with equality but A1's, which is the Hessian's own."""
        apart = self.pulls - self.pulls.mean(0)
        largest = float(self.spectrum.max())
        return Constants(
            dim=len(self.spectrum),
            effective_rank=max(1.0, float(self.spectrum.sum()) / largest),
            smoothness=(1 + self.wobble) * largest,
            c_g=1 + self.wobble**2,
            sigma_g2=self.noise * len(self.spectrum),
            sigma_h2=float((apart**2).sum(1).max()),
        )


def plant(
    seed: int, *, dim: int, rank: float, clients: int, apart: float = 0.0, wobble: float = 0.0, noise: float = 0.0
) -> tuple[Quadratic, Array]:
    """Returns clients with L near 1 and a planted effective rank, sigma_h2 and sigma_g2, and a start with gap 1.

    Args:
      seed: of pulls and start.
      dim: d.
      rank: tr(A) / |A|op, at most d: one eigenvalue is 1, the others are alike.
      clients: N.
      apart: largest |grad f_i - grad f|^2.
      wobble: batch factor a.
      noise: sigma_g2.
    """
    generator = np.random.default_rng(seed)
    rest = max(1e-6, (rank - 1) / max(dim - 1, 1))
    spectrum = np.array([1.0, *[rest] * (dim - 1)])
    pulls = generator.normal(size=(clients, dim))
    pulls -= pulls.mean(0)
    longest = float((pulls**2).sum(1).max())
    pulls *= np.sqrt(apart / longest) if longest > 0 else 0.0
    start = generator.normal(size=dim)
    # The start's gap is 1 (the optimum is 0), so that what is compared has as far to go.
    start /= np.sqrt((spectrum * start**2).sum() / 2)
    return Quadratic(spectrum, pulls, wobble, noise / dim), start


def course(problem: Quadratic, start: Array, *, setting: Setting) -> tuple[list[float], list[float]]:
    """Returns E f - f* and E|grad f|^2 before each round and after the last.

    Eigenvalues are shared, so coordinates stay uncorrelated up to what an estimate's length couples: the second moment
    of an estimate is 2 E g_k^2 + E|g|^2 per coordinate, for E[z z'g g'z z'] = 2 g g' + |g|^2 I.
    """
    mean, variance = start.copy(), np.zeros_like(start)
    gaps, squares = [problem.gap(mean, variance)], [problem.gradient2(mean, variance)]
    for _ in range(setting.rounds):
        mean, variance = _round(problem, mean, variance, setting=setting)
        gaps.append(problem.gap(mean, variance))
        squares.append(problem.gradient2(mean, variance))
    return gaps, squares


def _round(problem: Quadratic, mean: Array, variance: Array, *, setting: Setting) -> tuple[Array, Array]:
    """Returns mean and variance of the weights after a round.

    Given the round's start the clients are independent, each one's mean is affine in it with the same factor, and the
    variance that walking adds is averaged away by N.
    """
    shrink = (1 - setting.rate * problem.spectrum) ** setting.steps
    ends, added = [], np.zeros_like(mean)
    for pull in problem.pulls:
        middle, spread = mean, variance.copy()
        for _ in range(setting.steps):
            spread = _step(problem, pull, middle, spread, rate=setting.rate, directions=setting.directions)
            middle = middle - setting.rate * (problem.spectrum * middle - pull)
        ends.append(middle)
        added += spread - shrink**2 * variance
    return np.mean(ends, axis=0), shrink**2 * variance + added / len(problem.pulls) ** 2


def _step(problem: Quadratic, pull: Array, mean: Array, variance: Array, *, rate: float, directions: int) -> Array:
    """Returns the variance of each coordinate after one step of one client."""
    shrink = 1 - rate * problem.spectrum
    exact = problem.spectrum * mean - pull
    own = (exact**2 + problem.spectrum**2 * variance) * (1 + problem.wobble**2) + problem.noise
    # Var e_k = E e_k^2 - (E g_k)^2 - what the start's own variance brings, which `shrink` carries on.
    second = (2 * own + own.sum()) / directions + own * (1 - 1 / directions)
    found: Array = shrink**2 * variance + rate**2 * (second - exact**2 - problem.spectrum**2 * variance)
    return found


def average(values: Sequence[float]) -> float:
    """Returns the mean over t < T, which the global bounds are of: all but the last."""
    return float(np.mean(values[:-1]))
