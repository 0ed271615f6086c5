"""A walk of nobody that stands for all of a round: what the model takes instead of a weighted mean of the replies.

Where clients share directions (`Task.shared`) a server may make one walk of theirs, a median say, or a sum with noise.
It is kept as one more reply, to one more task, of the client `WHOLE`; the model takes it with weight 1 and the replies
it was made of with weight 0. So journal, replay and catch-up have nothing new to learn, and clients that catch up get
one walk for a round, however many took part.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedmezo.fl.algorithm import Reply, Task

__all__ = ["WHOLE", "is_whole", "own", "whole"]

WHOLE = 2**32 - 1  # the client that stands for all


def whole(
    task: Task, coefficients: Sequence[float], *, loss: float = math.nan, examples: int = 0
) -> tuple[Task, Reply]:
    """Returns the walk with these coefficients, in the order of the task's directions, as a task and a reply of nobody.

    Args:
      task: that of any client of the round; its directions must be shared.
      coefficients: how far to go along each of its directions; rounded to float32 here and to 11 bits when walked.
      loss: what stands for the clients' training losses, nats; nan where they are unknown.
      examples: clients it was made of, where nobody has replies of theirs; 0 where these are beside it.
    """
    nobodys = replace(
        task, client=WHOLE, rate=1.0, clip=math.inf, momentum=0.0, normalise=False, importance=False, coding="float32",
        dense=False,
    )  # fmt: skip
    slopes = np.float32(-task.directions) * np.array(coefficients, np.float32)
    return nobodys, Reply(task.round, WHOLE, examples, loss, tuple(slopes.astype(np.float64).tolist()))


def is_whole(one: Task | Reply) -> bool:
    """Whether a task or a reply is nobody's and stands for all."""
    return one.client == WHOLE


def own(replies: Sequence[Reply]) -> list[Reply]:
    """Returns the replies of clients."""
    return [reply for reply in replies if not is_whole(reply)]
