"""How much privacy releases cost: epsilon of the subsampled Gaussian mechanism, by dp-accounting.

    epsilon([Releases(sigma=1.0, rate=0.05, count=600)], delta=1e-5)         # 8.29
    sigma_for(4.0, rate=0.05, count=600, delta=1e-5)

Two data sets are neighbours when one has one unit more than the other: an example, or a client with all it has. Every
number here is an upper bound for them. "pld" composes privacy loss distributions, rounded up; "rdp" composes Renyi
divergences and is some 10 % looser, but others can repeat it with pencil and paper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from fedmezo.errors import ConfigError, missing

__all__ = ["Accountant", "Releases", "epsilon", "sigma_for"]

Accountant = Literal["pld", "rdp"]
# Privacy losses are rounded up to multiples of this: 0.01 % of epsilon after 600 releases.
_GRID = 1e-3
_LEAST, _MOST = 0.05, 1e6  # multipliers that are tried
_NEAR = 0.85  # the loose accountant asks for less than this factor more
_CLOSE = 1.002  # how near to the smallest sufficient multiplier is near enough


@dataclass(frozen=True, slots=True)
class Releases:
    """Some releases by the Gaussian mechanism, each of its own Poisson sample of the units.

    Attributes:
      sigma: noise multiplier: standard deviation of the noise over what one unit can change; 0 for no noise.
      rate: probability with which a unit is in a sample.
      count: how many.

    Raises:
      ConfigError: a number is out of range.
    """

    sigma: float
    rate: float
    count: int

    def __post_init__(self) -> None:
        """Checks every number."""
        if not (0 <= self.sigma < math.inf and 0 <= self.rate <= 1 and self.count >= 0):
            raise ConfigError(
                f"Releases: expected sigma >= 0, rate in [0, 1] and count >= 0, got {self.sigma}, {self.rate} and "
                f"{self.count}."
            )


def epsilon(releases: Sequence[Releases], *, delta: float, accountant: Accountant = "pld") -> float:
    """Returns the smallest known epsilon such that all releases together are (epsilon, delta)-private.

    Args:
      releases: what was released; later ones may depend on earlier ones.
      delta: in (0, 1).
      accountant: how they are composed.

    Raises:
      ConfigError: delta is out of range, or dp-accounting is not installed.
    """
    if not 0 < delta < 1:
        raise ConfigError(f"delta: expected a number in (0, 1), got {delta}.")
    told = tuple(some for some in releases if some.count and some.rate)
    if any(some.sigma == 0 for some in told):
        return math.inf
    return _epsilon(told, delta, accountant) if told else 0.0


@lru_cache(maxsize=4096)
def _epsilon(releases: tuple[Releases, ...], delta: float, accountant: Accountant) -> float:
    events, book = _book(accountant)
    for some in releases:
        one = events.GaussianDpEvent(some.sigma)
        sampled = one if some.rate == 1 else events.PoissonSampledDpEvent(some.rate, one)
        book.compose(sampled, some.count)
    return float(book.get_epsilon(delta))


def _book(accountant: Accountant) -> tuple[Any, Any]:
    """Returns dp-accounting's events, and an empty account."""
    try:
        from absl import logging
        from dp_accounting import dp_event, pld, rdp  # type: ignore[import-untyped]
    except ImportError as error:
        raise missing("Privacy is accounted for by dp-accounting", extra="privacy") from error
    logging.set_verbosity(logging.ERROR)  # it tells of every order that it leaves out, which costs nothing
    if accountant == "pld":
        return dp_event, pld.PLDAccountant(value_discretization_interval=_GRID)
    return dp_event, rdp.RdpAccountant()


def sigma_for(target: float, *, rate: float, count: int, delta: float, accountant: Accountant = "pld") -> float:
    """Returns a noise multiplier with which so many releases cost at most `target`, at most 0.3 % above the smallest.

    Args:
      target: epsilon, > 0.
      rate: probability with which a unit is in a release's sample.
      count: number of releases.
      delta: in (0, 1).
      accountant: as for `epsilon`.

    Raises:
      ConfigError: no multiplier up to a million is enough, or as `epsilon`.
    """
    if not target > 0:
        raise ConfigError(f"epsilon: expected a number > 0, got {target}.")

    def cost(sigma: float) -> float:
        return epsilon([Releases(sigma, rate, count)], delta=delta, accountant=accountant)

    # Loss distributions of little noise take long, and a sufficient multiplier by divergences is close above.
    high = 1.0 if accountant == "rdp" else sigma_for(target, rate=rate, count=count, delta=delta, accountant="rdp")
    while cost(high) > target:
        high *= 2
        if high > _MOST:
            raise ConfigError(f"epsilon: no noise makes {count} releases cost {target} or less; raise it.")
    low = _NEAR * high
    while low > _LEAST and cost(low) <= target:
        low, high = _NEAR * low, low
    while high > _CLOSE * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= target else (middle, high)
    # Four digits, rounded up, so that a configuration holds the very number that was checked.
    unit = 10.0 ** (math.floor(math.log10(high)) - 4)
    return float(f"{math.ceil(high / unit) * unit:.6g}")
