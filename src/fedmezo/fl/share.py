"""What a client gives to a secret sum, for a server that shall see no client's walk, and what the mean is made into.

The clients of a round share directions (`Task.shared`). A share says how far a walk went along each of them, and its
mean loss, all in [-1, 1] by limits that everyone knows. The mean of the shares is all the server gets; it becomes a
walk of nobody (`whole.py`), so a journal, a replay and a catch-up take it like any other.

Directions of each client's own would make such sums worthless: whoever knows the run's seed knows who drew what, and
the sum along a direction that one client drew alone is that client's slope.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Algorithm, Reply, Task
from fedmezo.fl.walk import walk_of
from fedmezo.fl.whole import whole

__all__ = ["WORST_LOSS", "limited", "numbers_of", "passes_of", "share_of", "summed"]

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


def numbers_of(task: Task) -> int:
    """Returns how many numbers a share has: one per step, and one for the loss."""
    return task.slopes + 1


def share_of(task: Task, reply: Reply) -> NDArray[np.float32]:
    """Returns what a client gives to a sum: steps + 1 numbers in [-1, 1].

    First the coefficients of its walk over rate * clip, which none exceeds by more than its rounding; then its loss
    over `WORST_LOSS`.

    Raises:
      RunError: the task's directions are the client's own, or there is no limit on |slope|.
    """
    unit = _unit(task)
    coefficients = np.array(walk_of(task, reply.slopes).coefficients) / (unit or 1.0)
    loss = reply.loss / WORST_LOSS if math.isfinite(reply.loss) else 1.0
    share: NDArray[np.float32] = np.clip([*coefficients, loss], -1, 1).astype(np.float32)
    return share


def summed(tasks: Sequence[Task], mean: NDArray[np.float64]) -> tuple[Task, Reply]:
    """Returns the mean of shares as a walk of nobody, which is the mean of the walks.

    The reply's `examples` is the number of clients in the sum, whose examples nobody knows.

    Args:
      tasks: those of the clients in the sum, which differ in client only.
      mean: steps + 1 numbers.

    Raises:
      RunError: the tasks differ, or there are more or fewer numbers.
    """
    first = tasks[0]
    if any(replace(task, client=first.client) != first for task in tasks) or mean.shape != (numbers_of(first),):
        raise RunError(
            f"Round {first.round}: a sum is of equal tasks, with {numbers_of(first)} numbers; got {mean.shape}."
        )
    coefficients = (_unit(first) * mean[:-1]).tolist()
    return whole(first, coefficients, loss=WORST_LOSS * float(mean[-1]), examples=len(tasks))


def _unit(task: Task) -> float:
    """Returns what a share is a multiple of: the largest coefficient that a walk can have."""
    if not task.shared or task.directions > 1 or task.momentum or not 0 < task.clip < math.inf:
        raise RunError(
            "A sum of walks needs shared directions, one a step, no momentum and a limit on |slope|, got shared = "
            f"{task.shared}, {task.directions} directions, momentum {task.momentum}, clip {task.clip}."
        )
    return task.rate * task.clip
