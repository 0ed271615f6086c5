"""Statistics and scores for leak.py: how well a curious server tells who was in a batch."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000

Floats = NDArray[np.float64]
Row = dict[str, Any]


def auc(members: Floats, others: Floats) -> float:
    """Returns the chance that a member scores above another, ties counting half."""
    above = (members[:, None] > others).mean() + 0.5 * (members[:, None] == others).mean()
    return float(above)


def mean_of(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean over trials and the ends of its 95 % bootstrap interval."""
    array = np.array(values)
    drawn = np.random.default_rng(1).integers(len(array), size=(RESAMPLES, len(array)))
    low, high = np.quantile(array[drawn].mean(1), [0.025, 0.975])
    return float(array.mean()), float(low), float(high)


def summary(trials: Sequence[tuple[Floats, Floats]]) -> Row:
    """Returns what is reported of the scores of members and others, one pair per trial."""
    mean, low, high = mean_of([auc(*trial) for trial in trials])
    members, others = (np.concatenate(side) for side in zip(*trials, strict=True))
    tpr = float((members > np.quantile(others, 0.99)).mean())
    top = [_found(*trial) for trial in trials]
    numbers = {"auc": mean, "low": low, "high": high, "tpr": tpr, "top": float(np.mean(top))}
    return {name: round(number, 4) for name, number in numbers.items()} | {"trials": len(trials)}


def _found(members: Floats, others: Floats) -> float:
    """Returns the share of members among as many best scores."""
    best = np.argsort(-np.concatenate([others, members]), kind="stable")[: len(members)]
    return float((best >= len(others)).mean())


def bound(epsilon: float, delta: float) -> float:
    """Returns the largest AUC of a test between neighbours under (epsilon, delta)-differential privacy.

    The ROC curve is min(1, delta + e^epsilon x, 1 - e^-epsilon (1 - delta - x)), from Kairouz et al. (ICML 2015).
    """
    x = np.linspace(0, 1, 200_001)
    curve = np.minimum(1, np.minimum(delta + np.exp(epsilon) * x, 1 - np.exp(-epsilon) * (1 - delta - x)))
    return float(np.trapezoid(curve, x))


def alone(seen: Floats, own: Floats, *, weights: Floats, batch: int, error: float) -> Floats:
    """Returns the log-likelihood ratio of each candidate.

    Args:
      seen: [n], the slopes of one step.
      own: [N, n], the candidates' own slopes there.
      weights: [N], the share each would have in the batch's loss.
      batch: examples in the batch.
      error: deviation of a seen slope from the exact one, as a share of the candidates' root mean square.
    """
    centre, width = own.mean(0), len(seen)
    spread = np.atleast_2d(np.cov(own.T)) + 1e-6 * np.mean(own**2) * np.eye(width)
    floor = error**2 * np.mean(own**2) * np.eye(width)
    rest = weights[:, None] * own + (1 - weights[:, None]) * centre
    inside = _normal(seen - rest, spread * (batch - 1) / batch**2 + floor)
    return inside - _normal((seen - centre)[None], spread / batch + floor)


def _normal(apart: Floats, cov: Floats) -> Floats:
    """Returns the log-density of a normal at each row of `apart`, up to a constant."""
    root = np.linalg.cholesky(cov)
    return -0.5 * (np.linalg.solve(root, apart.T) ** 2).sum(0) - np.log(np.diag(root)).sum()


def joint(seen: Floats, own: Floats, *, weights: Floats, batch: int, error: float) -> Floats:
    """Returns each candidate's part in the best linear explanation of the slopes by all; arguments as for `alone`."""
    prior = batch / len(own)
    parts = (own * weights[:, None]).T
    cov = prior * (1 - prior) * parts @ parts.T + error**2 * np.mean(own**2) * np.eye(len(seen))
    wrong = seen - prior * parts.sum(1)
    return prior * (1 - prior) * parts.T @ np.linalg.solve(cov, wrong)


def subset(seen: Floats, own: Floats, *, sizes: Floats, batch: int, error: float) -> Floats:
    """Returns each candidate's chance of being in the batch, every set of that many candidates being as likely.

    Args:
      seen: [n], the slopes of one step.
      own: [N, n], the candidates' own slopes there.
      sizes: [N], what each weighs in the loss of a batch: its label tokens, or 1.
      batch: examples in the batch, 4 at most.
      error: as for `alone`.
    """
    sets = _sets(len(own), batch)
    total = sizes[sets].sum(1)
    wrong = np.zeros(len(sets))
    for at, slope in enumerate(seen):
        wrong += ((sizes * own[:, at])[sets].sum(1) / total - slope) ** 2
    likely = np.exp(-(wrong - wrong.min()) / (2 * error**2 * np.mean(own**2)))
    return np.bincount(sets.ravel(), np.repeat(likely, batch), len(own)) / likely.sum()


@lru_cache(maxsize=2)
def _sets(count: int, size: int) -> NDArray[np.int64]:
    return np.array(list(combinations(range(count), size)))


def poisson_scores(seen: Floats, own: Floats, *, rate: float, kept: int, deviation: float) -> Floats:
    """Returns each candidate's log-likelihood ratio of a run of sums over Poisson batches, its coins being unknown."""
    centre, square = own.mean(1), (own**2).mean(1)
    width = rate * square - (rate * centre) ** 2
    without = (seen - rate * kept * centre, kept * width + deviation**2)
    apart, spread = seen - rate * (kept - 1) * centre, (kept - 1) * width + deviation**2

    def density(x: Floats, variance: Floats) -> Floats:
        return -0.5 * x**2 / variance - 0.5 * np.log(variance)

    inside = density(apart[:, None] - own, spread[:, None])
    outside = density(apart, spread)[:, None]
    mixed = np.logaddexp(np.log(rate) + inside, np.log1p(-rate) + outside)
    return (mixed - density(*without)[:, None]).sum(0)


def mixed(ratio: Floats, rate: float) -> Floats:
    return np.logaddexp(np.log1p(-rate), np.log(rate) + ratio).sum(0)


def split(scores: Floats, kept: int) -> tuple[Floats, Floats]:
    return scores[:kept], scores[kept:]


def cosine(one: Floats, other: Floats) -> float:
    """Returns the cosine of two vectors."""
    return float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
