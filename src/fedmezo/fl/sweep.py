"""Sums over a pool, for a server that shall see no client's walk: what a client gives, and what the mean is made into.

A client's share says how far its walk went along each candidate seed, and its mean loss, all in [-1, 1] by limits that
everyone knows. The mean of the shares is all the server gets. It becomes one reply of nobody, `SUM`, to a sweep: a task
whose directions are the candidates in order. So a journal, a replay and a catch-up take it like any other walk.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Algorithm, Reply, Task
from fedmezo.fl.pool import directions_of
from fedmezo.fl.walk import walk_of
from fedmezo.fl.whole import WHOLE

__all__ = ["SUM", "WORST_LOSS", "limited", "passes_of", "share_of", "swept"]

SUM = WHOLE  # the client that stands for all whose shares are in a sum
WORST_LOSS = 32.0  # nats; a higher loss counts as this, and so does one that is not finite

S = TypeVar("S")


def limited(algorithm: Algorithm[S], *, clip: float) -> Algorithm[S]:
    """Returns the algorithm with `clip` as the limit on |slope| of every task, instead of a running scale."""
    return replace(
        algorithm,
        plan=lambda state, clients: [replace(task, clip=clip) for task in algorithm.plan(state, clients)],
    )


def passes_of(task: Task) -> int:
    """Returns the forward passes of a walk."""
    return task.steps * (2 * task.directions if task.estimator == "two-point" else task.directions + 1)


def share_of(task: Task, reply: Reply) -> NDArray[np.float32]:
    """Returns what a client gives to a sum: pool + 1 numbers in [-1, 1].

    First its coefficients by candidate seed, over rate * clip * steps, which no sum of them exceeds by more than their
    rounding; then its loss over `WORST_LOSS`.

    Raises:
      RunError: the task has no pool or no limit on |slope|.
    """
    share, unit = np.zeros(task.pool + 1), _unit(task)
    np.add.at(share, list(directions_of(task).places), walk_of(task, reply.slopes).coefficients)
    share /= unit if unit else 1.0
    share[-1] = reply.loss / WORST_LOSS if math.isfinite(reply.loss) else 1.0
    return np.clip(share, -1, 1).astype(np.float32)


def swept(tasks: Sequence[Task], mean: NDArray[np.float64]) -> tuple[Task, Reply]:
    """Returns the mean of shares as a reply, and the sweep that it answers; its walk is the mean of the walks.

    The reply's `examples` is the number of clients in the sum, whose examples nobody knows.

    Args:
      tasks: those of the clients in the sum, which differ in client only.
      mean: pool + 1 numbers.

    Raises:
      RunError: the tasks differ, or there are more or fewer numbers.
    """
    first = tasks[0]
    if any(replace(task, client=first.client) != first for task in tasks) or mean.shape != (first.pool + 1,):
        raise RunError(
            f"Round {first.round}: a sum is of equal tasks, with {first.pool + 1} numbers; got {mean.shape}."
        )
    slopes = (0.0 - _unit(first) * mean[:-1]).astype(np.float32)
    sweep = replace(first, client=SUM, rate=1.0, steps=first.pool, clip=math.inf, sweep=True)
    loss = WORST_LOSS * float(mean[-1])
    return sweep, Reply(first.round, SUM, len(tasks), loss, tuple(slopes.astype(np.float64).tolist()))


def _unit(task: Task) -> float:
    """Returns what a share is a multiple of: the largest sum of coefficients that a walk can have."""
    if not task.pool or not 0 < task.clip < math.inf:
        raise RunError(f"A sum of walks needs a pool and a limit on |slope|, got {task.pool} seeds, clip {task.clip}.")
    return task.rate * task.clip * task.steps
