"""Curvature along random directions from forward passes: z'Hz as a second difference, and its errors."""

import math
from collections.abc import Collection, Iterator, Sequence
from statistics import fmean, stdev

from fedmezo.fl.algorithm import Point
from fedmezo.models.bench import ModelBench
from fedmezo.zo.noise import round_coefficient
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_

__all__ = ["Batch", "curvature_samples", "default_mu", "flaws"]

Batch = tuple[int, int, int]

_AT_ONCE = 16  # directions whose points are handed over together


def default_mu(kind: str) -> float:
    """Returns the radius at which rounding and bend are both small in float32: 1e-2 for "lora", 1e-3 for "full".

    Of a second difference, float32 rounding grows as 1 / mu^2 and the bend, what the fourth derivative adds, as mu^2.
    `docs/rank.md` has both as measured.
    """
    return 1e-3 if kind == "full" else 1e-2


def curvature_samples(
    bench: ModelBench,
    *,
    params: Params,
    seeds: Sequence[int],
    batches: Sequence[Batch],
    mu: float,
    names: Collection[str] | None = None,
) -> list[float]:
    """Returns (f(+) + f(-) - 2 f(0)) / mu^2 along z(seed) for each seed, f being the mean loss of the batches.

    It is z'Hz up to terms of mu^2. z follows the bench's law, or is Gaussian where `names` are given; `theory.rank`
    wants Gaussian.

    Args:
      bench: a model in float32.
      params: where; only read.
      seeds: names of the directions.
      batches: (client, round, step) of each batch; at least one.
      mu: radius in parameter units.
      names: the parameters that move; None for all.
    """
    radius = round_coefficient(mu)  # what the noise is multiplied by; the divisor must be the same number
    middle = fmean(bench.losses([Point(params, 0, 0.0, *batch) for batch in batches]))
    samples: list[float] = []
    for first in range(0, len(seeds), _AT_ONCE):
        points = [
            point
            for seed in seeds[first : first + _AT_ONCE]
            for side in (radius, -radius)
            for point in _points(params, seed, offset=side, batches=batches, names=names)
        ]
        found, width = bench.losses(points), len(batches)
        means = [fmean(found[at : at + width]) for at in range(0, len(found), width)]
        pairs = zip(means[::2], means[1::2], strict=True)
        samples += [(plus + minus - 2 * middle) / radius**2 for plus, minus in pairs]
    return samples


def flaws(
    bench: ModelBench, *, params: Params, seeds: Sequence[int], batches: Sequence[Batch], mu: float
) -> tuple[float, float]:
    """Returns two relative errors of samples at `mu`: of rounding, to their spread, and of the bend, to their mean.

    At mu / 100 a second difference is nothing but rounding, of the same absolute size as at mu. The bend is what the
    mean along the same directions changes from mu / 2 to mu, times 4/3 since it grows as mu^2.

    Args:
      bench: as for `curvature_samples`.
      params: likewise.
      seeds: directions to look along; at least 2, few are enough.
      batches: likewise.
      mu: the radius in question.
    """
    here, half, near = (
        curvature_samples(bench, params=params, seeds=seeds, batches=batches, mu=scale * mu) for scale in (1, 0.5, 0.01)
    )
    spread, middle = stdev(here), fmean(here)
    rounding = 0.01**2 * math.sqrt(fmean(value * value for value in near))
    return (
        rounding / spread if spread else math.nan,
        4 / 3 * (middle - fmean(half)) / abs(middle) if middle else math.nan,
    )


def _points(
    params: Params, seed: int, *, offset: float, batches: Sequence[Batch], names: Collection[str] | None
) -> Iterator[Point]:
    if names is None:
        yield from (Point(params, seed, offset, *batch) for batch in batches)
        return
    part = Params({name: params[name].detach().clone() for name in names})
    step_(part, seed, coefficient=offset, law="gaussian")
    moved = Params({**params.tensors, **part.tensors})
    yield from (Point(moved, seed, 0.0, *batch) for batch in batches)
