"""The server's side of every algorithm: who is asked, at what rate, and what counts as an answer."""

import math
import random
from collections.abc import Sequence
from typing import Literal

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Reply
from fedmezo.zo.noise import derive_seed

__all__ = ["Decay", "decayed", "draw_cohort", "in_order"]

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


def in_order(replies: Sequence[Reply], round: int, *, slopes: int) -> list[Reply]:
    """Returns the replies in client order.

    Raises:
      RunError: a client replied twice, for another round, or with another number of slopes than `slopes`.
    """
    ordered = sorted(replies, key=lambda reply: reply.client)
    clients = [reply.client for reply in ordered]
    if len(set(clients)) < len(clients):
        raise RunError(f"Round {round}: a client replied twice (clients {clients}).")
    for reply in ordered:
        if reply.round != round or len(reply.slopes) != slopes:
            raise RunError(
                f"Round {round}: client {reply.client} sent {len(reply.slopes)} slopes for round {reply.round}, "
                f"expected {slopes}."
            )
    return ordered
