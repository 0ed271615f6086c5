"""Products of gradients from slopes alone, and the lines of Assumptions 4 and 6 through them.

For Gaussian z, E (z'a)(z'b) = a'b. So slopes along the same z on two batches, or of two clients, give products of their
gradients without a gradient. A square from one slope would count the batch's noise; a product of slopes on two
independent batches does not. Every statistic here is a mean over directions, each with batches of its own, so that
resampling the directions resamples the batches too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedmezo.errors import ConfigError

__all__ = ["Array", "Moments", "cover_line", "fit_line", "moments", "resamplings", "spearman", "spread_of"]

Array: TypeAlias = NDArray[np.float64]

_LOW, _HIGH = 2.5, 97.5


@dataclass(frozen=True)
class Moments:
    """Unbiased samples at one point, one per direction; their means over directions are the moments.

    Attributes:
      own: |grad f_i|^2, (directions, clients).
      batch: E|grad F_i|^2 over mini-batches, (directions, clients).
      aligned: grad f_i ' grad f, (directions, clients).
      apart: |grad f_i - grad f|^2, (directions, clients).
      whole: |grad f|^2 of the clients' uniform mean, (directions,).
    """

    own: Array
    batch: Array
    aligned: Array
    apart: Array
    whole: Array


def moments(slopes: ArrayLike) -> Moments:
    """Returns the samples that slopes of shape (directions, clients, batches) give.

    Batches of one client and direction must be independent of each other and of the other clients'. Squares are
    products over pairs of different batches, (s_1 + ... + s_B)^2 - (s_1^2 + ... + s_B^2) over B (B - 1), so a sample,
    even of a square, may be negative.

    Raises:
      ConfigError: the array has another shape, fewer than two batches, or a slope that is not finite.

    Source: PAPER.md 3.1, Assumptions 4 and 6; E[z z'] = I.
    """
    found = np.asarray(slopes, dtype=np.float64)
    if found.ndim != 3 or found.shape[2] < 2:
        raise ConfigError(f"Slopes must be (directions, clients, at least 2 batches), got the shape {found.shape}.")
    if not np.isfinite(found).all():
        raise ConfigError("A loss was not finite where the constants were measured; lower the spread or the rate.")
    batches = found.shape[2]
    batch, mean = (found**2).mean(2), found.mean(2)
    own = (batches * mean**2 - batch) / (batches - 1)
    # A client's product with itself comes from two batches, with another client from the means of both.
    aligned = mean * (mean.mean(1, keepdims=True) - mean / found.shape[1]) + own / found.shape[1]
    whole = aligned.mean(1)
    return Moments(own, batch, aligned, own - 2 * aligned + whole[:, None], whole)


def resamplings(count: int, *, resamples: int, seed: int) -> Array:
    """Returns weights (resamples, count), each row the shares of one draw with replacement among `count` directions."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    return np.asarray(drawn / count, dtype=np.float64)


def spread_of(values: ArrayLike) -> tuple[float, float]:
    """Returns the middle 95 % of resampled values; (nan, nan) when none is finite."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    return (float(np.percentile(known, _LOW)), float(np.percentile(known, _HIGH))) if known.size else (np.nan, np.nan)


def fit_line(x: ArrayLike, y: ArrayLike, *, weights: ArrayLike, least: float = 0.0) -> tuple[Array, Array]:
    """Returns the factor c >= least and the constant s >= 0 with the smallest weighted squares of y - c x - s.

    Non-negative least squares of two unknowns: the best of the free solution and the two borders. Where x does not
    vary, nothing tells c from s, and all goes to s.

    Args:
      x: (..., rows).
      y: (..., rows).
      weights: (rows,) or (..., rows), not negative.
      least: smallest c.

    Returns:
      Two arrays of the leading shape.

    Source: Assumption 4 (least = 1) and Assumption 6 (least = 0).
    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    up = up - least * across
    shares = np.broadcast_to(np.asarray(weights, dtype=np.float64), up.shape)
    shares = shares / shares.sum(-1, keepdims=True)
    mean_x, mean_y, mean_xx, mean_xy = ((shares * part).sum(-1) for part in (across, up, across**2, across * up))
    varies = mean_xx - mean_x**2
    zero = np.zeros_like(mean_x)
    with np.errstate(divide="ignore", invalid="ignore"):
        free = np.where(varies > 1e-12 * mean_xx, (mean_xy - mean_x * mean_y) / varies, -1.0)
        alone = np.where(mean_xx > 0, np.maximum(mean_xy / mean_xx, 0), 0.0)
    found = np.stack([np.stack([zero, np.maximum(mean_y, 0)]), np.stack([alone, zero])])
    inside = np.stack([free, mean_y - free * mean_x])
    found = np.concatenate([found, np.where((inside >= 0).all(0), inside, found[0])[None]])
    misfits = (shares * (up - found[:, 0, ..., None] * across - found[:, 1, ..., None]) ** 2).sum(-1)
    best = np.take_along_axis(found, misfits.argmin(0)[None, None], axis=0)[0]
    return best[0] + least, best[1]


def cover_line(x: Sequence[float], y: Sequence[float], *, least: float = 0.0) -> tuple[float, float]:
    """Returns c >= least and s >= 0 with c x + s >= y at every point, as low as such a line can be on average.

    Its mean over the points is convex and piecewise linear in c, so it is smallest at a slope between two points, from
    the origin to one, or at `least`.

    Source: Assumptions 4 and 6, read as inequalities at the points measured.
    """
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = np.concatenate([((up[:, None] - up) / (across[:, None] - across)).ravel(), up / across])
    tried = np.unique(np.append(slopes[np.isfinite(slopes) & (slopes > least)], least))
    floors = np.maximum((up - tried[:, None] * across).max(1), 0)
    best = int((tried * max(across.mean(), 0) + floors).argmin())
    return float(tried[best]), float(floors[best])


def spearman(some: ArrayLike, others: ArrayLike) -> float | None:
    """Returns the rank correlation, ties with their mean rank; None where one does not vary or of fewer than 3."""
    one, two = _ranks(some), _ranks(others)
    if len(one) < 3 or not (one.std() and two.std()):
        return None
    return float(np.corrcoef(one, two)[0, 1])


def _ranks(values: ArrayLike) -> Array:
    given = np.asarray(values, dtype=np.float64)
    below, equal = (given[:, None] > given).sum(1), (given[:, None] == given).sum(1)
    return np.asarray(below + (equal - 1) / 2, dtype=np.float64)
