"""How directions get their names: fresh for every step, or drawn from a pool of candidate seeds.

A draw is a pure function of the task, in whole numbers, so server and client agree on every machine and neither seeds
nor their places in the pool ever travel.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from fedmezo.fl.algorithm import Task
from fedmezo.zo.noise import derive_seed

__all__ = ["Directions", "direction_seed", "directions_of", "pool_seed"]


def direction_seed(task: Task, step: int, direction: int) -> int:
    """Returns the name of a fresh direction, from (run, round, client, step, direction); without client if shared."""
    return derive_seed(*_whose("direction", task), step, direction)


def _whose(what: str, task: Task) -> tuple[str | int, ...]:
    if task.shared:
        return f"shared {what}", task.seed, task.round
    return what, task.seed, task.round, task.client


def pool_seed(seed: int, place: int) -> int:
    """Returns the candidate seed at a place of the pool; one master seed, the run's, names them all."""
    return derive_seed("pool", seed, place)


@dataclass(frozen=True, slots=True)
class Directions:
    """The directions of a task in step order, steps * directions of them.

    Attributes:
      seeds: their names.
      places: their places in the pool; () without a pool.
      factors: importance weight 1 / (K p_j) of each; () for 1.
    """

    seeds: tuple[int, ...]
    places: tuple[int, ...] = ()
    factors: tuple[float, ...] = ()


@lru_cache(maxsize=4)
def _edges(odds: tuple[int, ...]) -> NDArray[np.int64]:
    """Returns where each candidate's share of the draws ends."""
    return np.cumsum(np.array(odds, np.int64))


def directions_of(task: Task) -> Directions:
    """Returns the directions a task names.

    Source: section 3 of FedKSeed (arXiv:2312.06353) for the pool; a draw uses 64 random bits and is off the given odds
    by less than 2**-40.
    """
    steps = list(product(range(task.steps), range(task.directions)))
    if not task.pool:
        return Directions(tuple(direction_seed(task, step, n) for step, n in steps))
    draws = [derive_seed(*_whose("draw", task), step, n) for step, n in steps]
    edges = _edges(task.odds)
    total = int(edges[-1]) if task.odds else task.pool
    marks = [draw * total >> 64 for draw in draws]
    places = tuple(int(place) for place in np.searchsorted(edges, marks, side="right")) if task.odds else tuple(marks)
    factors = tuple(total / (task.pool * task.odds[place]) for place in places) if task.importance and task.odds else ()
    return Directions(tuple(pool_seed(task.seed, place) for place in places), places, factors)
