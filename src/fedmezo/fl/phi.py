"""From values of a signal to Phi: comparisons of clients, as pure functions of client -> number."""

import math
import random
from collections.abc import Sequence
from statistics import fmean
from typing import Literal

import numpy as np

from fedmezo.fl.signals import SMALL, Values
from fedmezo.zo.noise import derive_seed

__all__ = [
    "Normaliser", "dealt", "deviations", "half_deviations", "mean_deviations", "normalised", "random_phi", "smoothed",
]  # fmt: skip

Normaliser = Literal["maxabs", "zscore-tanh", "rank", "none"]


def deviations(values: Values, *, relative: bool = False) -> dict[int, float]:
    """Returns how far each client's value is from the mean of those there; 0 for all when values are alike.

    Args:
      values: client -> value.
      relative: as a share of the mean, for values without a unit of their own; 0 for all when the mean is not positive.
    """
    if not values:
        return {}
    mean = fmean(values.values())
    gaps = {client: value - mean for client, value in values.items()}
    if max(map(abs, gaps.values())) <= SMALL * max(map(abs, values.values())) or (relative and mean <= 0):
        return dict.fromkeys(values, 0.0)
    return {client: gap / mean for client, gap in gaps.items()} if relative else gaps


def mean_deviations(seen: Sequence[Values], *, relative: bool = False) -> dict[int, float]:
    """Returns each client's deviation, averaged over the rounds of a window in which it is there.

    Args:
      seen: client -> value for each round.
      relative: as in `deviations`.
    """
    gathered: dict[int, list[float]] = {}
    for values in seen:
        for client, gap in deviations(values, relative=relative).items():
            gathered.setdefault(client, []).append(gap)
    size = max((abs(gap) for gaps in gathered.values() for gap in gaps), default=0.0)
    means = {client: fmean(gaps) for client, gaps in sorted(gathered.items())}
    # Deviations that cancel over the window leave a rounding error, which no normaliser shall blow up.
    return {client: mean if abs(mean) > 1e-9 * size else 0.0 for client, mean in means.items()}


def half_deviations(seen: Sequence[Values]) -> dict[int, float]:
    """Returns `mean_deviations` as the paper's code has them: float16 values, means and differences."""
    logs = [{client: value for client, value in values.items() if abs(value) < 65504} for values in seen]
    means = [_half_mean(list(log.values())) if log else np.float16(0) for log in logs]
    found = {}
    for client in sorted({client for log in logs for client in log}):
        there = [(log[client], mean) for log, mean in zip(logs, means, strict=True) if client in log]
        own, other = (_half_mean(part) for part in zip(*there, strict=True))
        found[client] = float(own - other)
    return found


def _half_mean(values: Sequence[float | np.float16]) -> np.float16:
    return np.float16(np.mean(np.array(values, np.float16)))


def normalised(gaps: Values, *, how: Normaliser = "maxabs") -> dict[int, float]:
    """Returns Phi in [-1, 1] for each client; 0 for all when no client deviates, never nan.

    Laws: the order of the clients does not matter; larger deviations never get a smaller Phi. All but `none` compare
    clients with each other, whatever the size of the deviations.

    Args:
      gaps: client -> deviation.
      how: maxabs (over the largest |deviation|; the paper's code) | zscore-tanh (tanh of it in standard deviations from
        the mean) | rank (evenly over [-1, 1], ties share a place) | none (limited to [-1, 1]).
    """
    largest = max(map(abs, gaps.values()), default=0.0)
    if largest == 0:
        return dict.fromkeys(gaps, 0.0)
    if how == "none":
        return {client: max(-1.0, min(1.0, gap)) for client, gap in gaps.items()}
    units = {client: gap / largest for client, gap in gaps.items()}
    if how == "maxabs":
        return units
    return _ranked(units) if how == "rank" else _scored(units)


def _scored(units: Values) -> dict[int, float]:
    mean = fmean(units.values())
    deviation = math.sqrt(fmean((unit - mean) ** 2 for unit in units.values()))
    if deviation <= SMALL:
        return dict.fromkeys(units, 0.0)
    return {client: math.tanh((unit - mean) / deviation) for client, unit in units.items()}


def _ranked(units: Values) -> dict[int, float]:
    ordered = sorted(units.values())
    most = len(ordered) - 1
    below: dict[float, int] = {}
    above: dict[float, int] = {}
    for place, unit in enumerate(ordered):
        below.setdefault(unit, place)
        above[unit] = place
    return {c: (below[u] + above[u] - most) / most if most else 0.0 for c, u in units.items()}


def smoothed(old: Values, new: Values, *, keep: float) -> dict[int, float]:
    """Returns keep * old + (1 - keep) * new for every client in either, where an absent one has 0."""
    if not keep:
        return dict(new)
    return {c: keep * old.get(c, 0.0) + (1 - keep) * new.get(c, 0.0) for c in sorted({*old, *new})}


def random_phi(seed: int, round: int, client: int) -> float:
    """Returns a control: uniform in [-1, 1), named by (seed, round, client)."""
    return derive_seed("personal", seed, round, client) / 2**63 - 1


def dealt(phi: Values, *, seed: int, round: int) -> dict[int, float]:
    """Returns a control: the same Phi, each with a client drawn at random, named by (seed, round).

    Every deal is equally likely, so a Phi may stay where it is: dealt rates know nothing of the signal.
    """
    clients = sorted(phi)
    taken = list(clients)
    random.Random(derive_seed("deal", seed, round)).shuffle(taken)
    return {client: phi[other] for client, other in zip(clients, taken, strict=True)}
