"""From losses to slopes: the estimators, and the clip that keeps one bad slope from ending a run."""

import math
from collections.abc import Sequence
from itertools import accumulate
from statistics import NormalDist, median
from typing import Literal

import numpy as np

__all__ = [
    "Estimator",
    "clip_slope",
    "coefficient",
    "forward_difference",
    "momentum_powers",
    "momentum_sums",
    "robust_scale",
    "slope_limit",
    "step_coefficients",
    "two_point",
]

Estimator = Literal["two-point", "forward", "forward-half"]

# A normal variable's median absolute value is 0.6745 standard deviations.
_MEDIAN_TO_DEVIATION = 1.4826


def two_point(above: float, below: float, *, mu: float) -> float:
    """Returns the slope (L(theta + mu z) - L(theta - mu z)) / (2 mu); nan if either loss is not finite.

    Exact for quadratic losses, for every mu > 0. Slope times z has mean grad F_mu, the gradient of the smoothed loss.

    Args:
      above: loss at theta + mu z.
      below: loss at theta - mu z, on the same batch.
      mu: perturbation scale in parameter units, > 0.

    Source: Definition 2.1 and Eq. 3 of arXiv:2402.05926.
    """
    return _finite((above - below) / (2 * mu)) if math.isfinite(above) and math.isfinite(below) else math.nan


def forward_difference(above: float, centre: float, *, mu: float, paper_eq2_scale: bool = False) -> float:
    """Returns the slope (L(theta + mu z) - L(theta)) / mu; nan if either loss is not finite.

    It has the same mean as the two-point slope and more odd-order error.

    Args:
      above: loss at theta + mu z.
      centre: loss at theta, on the same batch.
      mu: perturbation scale in parameter units, > 0.
      paper_eq2_scale: use the factor 1 / (2 mu) as printed in Eq. 2, whose mean is half the gradient.

    Source: Eq. 2 of arXiv:2402.05926, with the factor its proof uses (Eqs. 36 and 37).
    """
    if not (math.isfinite(above) and math.isfinite(centre)):
        return math.nan
    return _finite((above - centre) / (2 * mu if paper_eq2_scale else mu))


def _finite(slope: float) -> float:
    """Returns the slope as the float32 that travels; nan when it does not fit."""
    narrow = float(np.float32(slope)) if abs(slope) < 3e38 else math.nan
    return narrow if math.isfinite(narrow) else math.nan


def robust_scale(slopes: Sequence[float], *, quantile: float = 0.5) -> float:
    """Returns 1.4826 times the median |slope| of the finite slopes: their deviation if normal; 0 if there are none.

    Args:
      slopes: any.
      quantile: which one to take instead of the median, in (0, 1); over what it is of standard normal values. A share
        of huge slopes above 1 - quantile sets the scale, and so does a share of tiny ones above `quantile`.
    """
    finite = [abs(slope) for slope in slopes if math.isfinite(slope)]
    if not finite or quantile == 0.5:
        return _MEDIAN_TO_DEVIATION * median(finite) if finite else 0.0
    return float(np.quantile(finite, quantile)) / NormalDist().inv_cdf((1 + quantile) / 2)


def clip_slope(slope: float, *, limit: float) -> float:
    """Returns the slope limited to [-limit, limit]; `limit` = inf leaves it, and nan, a skipped step, stays nan."""
    # min and max give their first argument where a comparison with nan is false.
    return slope if math.isnan(slope) else max(-limit, min(limit, slope))


def coefficient(slope: float, *, rate: float, directions: int = 1) -> float:
    """Returns what multiplies z(seed) in the step: -rate * slope / directions; 0 for a slope that is not finite."""
    return -rate * slope / directions if math.isfinite(slope) else 0.0


def slope_limit(slopes: Sequence[float], *, clip: float, multiple: float) -> float:
    """Returns the limit on the last of `slopes`.

    Args:
      slopes: the walk's slopes so far, nan where skipped.
      clip: the limit the server set; inf for none; 0 when no scale is known yet, then the limit is `multiple` times the
        robust scale of `slopes`.
      multiple: see `clip`.
    """
    return clip if clip > 0 else multiple * robust_scale(slopes)


def step_coefficients(
    slopes: Sequence[float],
    *,
    rate: float,
    directions: int,
    clip: float,
    multiple: float,
    normalise: bool = False,
    factors: Sequence[float] = (),
) -> list[float]:
    """Returns the coefficients of a walk's last step: one for each of its `directions` directions.

    Client and server both compute them, so only slopes travel.

    Args:
      slopes: the walk's slopes up to and including this step, nan where skipped.
      rate: learning rate.
      directions: directions per step, n.
      clip: as in `slope_limit`.
      multiple: as in `slope_limit`.
      normalise: divide the step's slopes by their root mean square, so that the coefficients' norm is rate / sqrt(n)
        whatever the scale of the loss. FZOO divides by the losses' deviation about their mean, which is the same for
        large n and may vanish for small n.
      factors: what multiplies each of the step's coefficients, 1 / (K p_j) for importance weights; () for 1.
    """
    begin = len(slopes) - directions
    clipped = [
        clip_slope(slopes[at], limit=slope_limit(slopes[: at + 1], clip=clip, multiple=multiple))
        for at in range(begin, len(slopes))
    ]
    unit = _root_mean_square(clipped) if normalise else 1.0
    amounts = [coefficient(slope, rate=rate, directions=directions) / unit if unit else 0.0 for slope in clipped]
    return [amount * factor for amount, factor in zip(amounts, factors, strict=True)] if factors else amounts


def _root_mean_square(slopes: Sequence[float]) -> float:
    """Returns the root mean square of the finite slopes; 0 if there are none."""
    finite = [slope for slope in slopes if math.isfinite(slope)]
    return math.sqrt(math.fsum(slope * slope for slope in finite) / len(finite)) if finite else 0.0


def momentum_sums(coefficients: Sequence[float], *, directions: int, momentum: float) -> list[float]:
    """Returns how far a walk with momentum has gone along each direction.

    The heavy ball m <- momentum * m + c z, theta <- theta + m moves along a direction by c (1 + momentum +
    momentum^2 + ...), one term for its own step and each later one. Terms below 2^-12 of the first are left out, here
    and in the walk itself: coefficients have 11 bits.

    Args:
      coefficients: what each direction adds to the velocity, in step order.
      directions: directions per step.
      momentum: in [0, 1); 0 returns the coefficients unchanged.
    """
    steps = len(coefficients) // directions
    sums = list(accumulate(momentum_powers(momentum, most=steps)))
    return [c * sums[min(steps - at // directions, len(sums)) - 1] for at, c in enumerate(coefficients)]


def momentum_powers(momentum: float, *, most: int | None = None) -> list[float]:
    """Returns 1, momentum, momentum^2, ... down to 2^-12: what is left of a push, by its age in steps.

    Args:
      momentum: in [0, 1).
      most: how many are wanted; of 0.99999999 there are a thousand million.
    """
    powers = [1.0]
    # Products, not powers of the C library: every machine must get the same bits.
    while powers[-1] * momentum >= 2**-12 and (most is None or len(powers) < most):
        powers.append(powers[-1] * momentum)
    return powers
