"""From losses to slopes: the estimators, and the clip that keeps one bad slope from ending a run."""

import math
from collections.abc import Sequence
from statistics import median
from typing import Literal

import numpy as np

__all__ = [
    "Estimator",
    "clip_slope",
    "coefficient",
    "forward_difference",
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


def robust_scale(slopes: Sequence[float]) -> float:
    """Returns 1.4826 times the median |slope| of the finite slopes: their deviation if normal; 0 if there are none."""
    finite = [abs(slope) for slope in slopes if math.isfinite(slope)]
    return _MEDIAN_TO_DEVIATION * median(finite) if finite else 0.0


def clip_slope(slope: float, *, limit: float) -> float:
    """Returns the slope limited to [-limit, limit]; `limit` = inf leaves it."""
    return max(-limit, min(limit, slope))


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
    slopes: Sequence[float], *, rate: float, directions: int, clip: float, multiple: float
) -> list[float]:
    """Returns the coefficient of every direction of a walk, from its slopes alone.

    Client and server both compute it, so only slopes travel. Arguments as in `coefficient` and `slope_limit`.
    """
    result: list[float] = []
    for end in range(1, len(slopes) + 1):
        limit = slope_limit(slopes[:end], clip=clip, multiple=multiple)
        result.append(coefficient(clip_slope(slopes[end - 1], limit=limit), rate=rate, directions=directions))
    return result
