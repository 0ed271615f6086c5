"""The update algebra: what one client walked, what a round adds to the model.

Nothing here holds a direction: an update is arithmetic on (seed, coefficient) pairs. Averaging the clients' models
equals averaging their walks, exactly in real arithmetic. In floating point one rule makes every path agree to the bit:
a walk sums in float64 in step order and rounds to float32 once, the round's weighted mean of walks sums in float64 in
client order, and the model takes it with one rounding, float32's own or a stochastic one. So a dense upload (the
rounded walk) and a scalar upload (its pairs) give the same model.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

__all__ = ["DenseDelta", "SeedSum", "Update", "Walk"]


def _check(seeds: Sequence[int], coefficients: Sequence[float]) -> None:
    if len(seeds) != len(coefficients):
        raise ValueError(f"seeds and coefficients differ in length: {len(seeds)} and {len(coefficients)}.")
    if not all(0 <= seed < 2**64 for seed in seeds):
        raise ValueError("seeds must be in [0, 2**64).")
    if not all(map(math.isfinite, coefficients)):
        raise ValueError("coefficients must be finite; a skipped step has coefficient 0.")


@dataclass(frozen=True, slots=True)
class Walk:
    """The steps coefficients[k] * z(seeds[k]) one client took, in order, unmerged."""

    seeds: tuple[int, ...]
    coefficients: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks lengths, ranges and finiteness."""
        _check(self.seeds, self.coefficients)

    def total(self) -> "SeedSum":
        """Returns where the walk ended, relative to where it began."""
        return SeedSum.of(zip(self.seeds, self.coefficients, strict=True))


@dataclass(frozen=True, slots=True)
class SeedSum:
    """The vector sum_k coefficients[k] * z(seeds[k]), seeds strictly increasing, coefficients float64.

    Laws: `+` is commutative and associative up to float64 rounding; `SeedSum()` is its zero; scaling distributes.
    """

    seeds: tuple[int, ...] = ()
    coefficients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Checks lengths, ranges, finiteness and order."""
        _check(self.seeds, self.coefficients)
        if any(a >= b for a, b in zip(self.seeds, self.seeds[1:], strict=False)):
            raise ValueError("seeds must be strictly increasing; use SeedSum.of().")

    @classmethod
    def of(cls, terms: Iterable[tuple[int, float]]) -> Self:
        """Returns the sum of `terms`; equal seeds merge, correctly rounded whatever their order."""
        gathered: dict[int, list[float]] = {}
        for seed, coefficient in terms:
            gathered.setdefault(seed, []).append(coefficient)
        return cls(tuple(sorted(gathered)), tuple(math.fsum(gathered[seed]) for seed in sorted(gathered)))

    def __iter__(self) -> Iterator[tuple[int, float]]:
        """Yields (seed, coefficient) in seed order."""
        return zip(self.seeds, self.coefficients, strict=True)

    def __add__(self, other: "SeedSum") -> "SeedSum":
        """Returns the sum of two sums."""
        return SeedSum.of([*self, *other])

    def scale(self, factor: float) -> "SeedSum":
        """Returns factor times the sum."""
        return SeedSum(self.seeds, tuple(factor * c for c in self.coefficients))


@dataclass(frozen=True)
class DenseDelta:
    """A walk or a gradient update written out: name -> float32 tensor, the change of one client's parameters."""

    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Update:
    """What one round adds to the model: the weighted mean of its clients' walks (or dense deltas), in client order.

    Attributes:
      parts: one walk or delta per client.
      weights: as many weights; rounded to float32 here, so that every machine multiplies by the same number.
      round: names the random bits by which 16-bit parameters round; without effect on float32 ones.
    """

    parts: tuple[Walk | DenseDelta, ...]
    weights: tuple[float, ...]
    round: int = 0

    def __post_init__(self) -> None:
        """Checks lengths and rounds the weights to float32."""
        if len(self.parts) != len(self.weights):
            raise ValueError(f"parts and weights differ in length: {len(self.parts)} and {len(self.weights)}.")
        object.__setattr__(self, "weights", tuple(float(np.float32(weight)) for weight in self.weights))
