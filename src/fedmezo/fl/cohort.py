"""The server's side of every algorithm: who is asked, at what rate, and what counts as an answer."""

import math
import random
from collections.abc import Sequence
from typing import Literal

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.whole import is_whole
from fedmezo.zo.noise import derive_seed

__all__ = ["Decay", "answers", "decayed", "draw_cohort"]

Decay = Literal["constant", "linear", "cosine", "wsd"]


def draw_cohort(seed: int, round: int, clients: Sequence[int], size: int) -> list[int]:
    """Returns `size` of the clients, or all if they are fewer, in ascending order; named by (seed, round).

    They are drawn without replacement.
    """
    return sorted(random.Random(derive_seed("cohort", seed, round)).sample(sorted(clients), min(size, len(clients))))


def decayed(decay: Decay, round: int, rounds: int) -> float:
    """Returns the factor on the rate in a round: 1 at first, falling to 0 over `rounds` unless constant.

    "wsd" (warm-up, stable, decay; here without warm-up) stays at 1 for half of the rounds and is linear from there.
    """
    done = min(round / rounds, 1.0)
    if decay == "wsd":
        return min(1.0, 2 * (1 - done))
    if decay == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if decay == "cosine" else 1.0


def answers(tasks: Sequence[Task], replies: Sequence[Reply], *, round: int) -> list[tuple[Task, Reply]]:
    """Returns each reply of a round with the task it answers, in client order; tasks without a reply are left out.

    Where a walk stands for all, the slopes of a reply may have been struck out.

    Raises:
      RunError: a client replied twice, for another round, without a task of this one, or with another number of slopes
        than its task asks for.
    """
    ordered = sorted(replies, key=lambda reply: reply.client)
    struck = bool(ordered) and is_whole(ordered[-1])
    clients = [reply.client for reply in ordered]
    if len(set(clients)) < len(clients):
        raise RunError(f"Round {round}: a client replied twice (clients {clients}).")
    asked = {task.client: task for task in tasks if task.round == round}
    for reply in ordered:
        if reply.client not in asked:
            raise RunError(f"Round {round}: client {reply.client} replied, and there is no task for it; was it asked?")
        expected = asked[reply.client].slopes
        gone = struck and not reply.slopes and not is_whole(reply)
        if reply.round != round or (len(reply.slopes) != expected and not gone):
            raise RunError(
                f"Round {round}: client {reply.client} sent {len(reply.slopes)} slopes for round {reply.round}, "
                f"expected {expected}."
            )
    return [(asked[reply.client], reply) for reply in ordered]
