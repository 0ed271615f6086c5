"""Where clients walk: in this process, or elsewhere (`workers.py`); the loop of a run cannot tell the difference.

A `Walkers` takes the tasks of a round and gives back a function that waits for the replies. Those that are `apart` walk
meanwhile, so the caller judges and journals the last round in that time. Those that are `distant` (`distant.py`) have a
model of their own that has to be brought up to date, and may not answer.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from fedmezo.fl.algorithm import Bench, Reply, Task
from fedmezo.runtime.pull import Tell
from fedmezo.zo.params import Params

__all__ = ["Absence", "Client", "Here", "MeteredBench", "Walked", "Walkers", "checksum"]

Client = Callable[[Sequence[Task], Bench], Sequence[Reply]]
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MeteredBench(Bench, Protocol):
    """A bench that counts its work."""

    forwards: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Absence:
    """Why a client that was asked is not in a round.

    Attributes:
      client: its number.
      kind: away | failed | refused | garbage | late; stale: it answered an earlier round after that was closed.
      text: a clause about it.
    """

    client: int
    kind: str
    text: str


@dataclass(frozen=True)
class Walked:
    """What came of some tasks.

    Attributes:
      replies: one per task, in the tasks' order; none for those that are absent.
      forwards: forward passes it took.
      tokens: tokens those passes read.
      seconds: wall clock of the walks.
      absent: who did not answer, or too late.
      sizes: client -> bytes that really went to it and came from it; None where nothing travelled.
      tasks: the tasks of replies that answer none that was given; then `replies` has these only.
    """

    replies: tuple[Reply, ...]
    forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0
    absent: tuple[Absence, ...] = ()
    sizes: Mapping[int, tuple[int, int]] | None = None
    tasks: tuple[Task, ...] = ()


class Walkers(Protocol):
    """Whoever does the clients' walks of a run."""

    @property
    def apart(self) -> bool:
        """Whether they walk while the caller does something else, on a model of their own."""

    @property
    def distant(self) -> bool:
        """Whether they bring that model up to date themselves, by what they are told."""

    def there(self, clients: Sequence[int]) -> Sequence[int]:
        """Returns those of the clients that can be asked now; may wait until there are enough."""

    def start(self, tasks: Sequence[Task], params: Params, tell: Tell) -> Callable[[], Walked]:
        """Begins the walks from `params` as they are now; returns what waits for the replies, in the tasks' order."""


@dataclass(frozen=True)
class Here:
    """Walks in this process, at once.

    Attributes:
      client: the algorithm's client.
      bench: the bench whose parameters the run moves.
    """

    client: Client
    bench: MeteredBench
    apart = False
    distant = False

    def there(self, clients: Sequence[int]) -> Sequence[int]:
        """Returns all of them."""
        return clients

    def start(self, tasks: Sequence[Task], params: Params, tell: Tell) -> Callable[[], Walked]:
        """Returns the replies of walks that are done already."""
        walked = walk(self.client, self.bench, tasks)
        return lambda: walked


def walk(client: Client, bench: MeteredBench, tasks: Sequence[Task]) -> Walked:
    """Returns what came of the tasks, with what it took."""
    forwards, tokens, began = bench.forwards, bench.tokens, time.perf_counter()
    replies = tuple(client(tasks, bench))
    return Walked(replies, bench.forwards - forwards, bench.tokens - tokens, time.perf_counter() - began)


def checksum(params: Params) -> tuple[int, ...]:
    """Returns the sum of every tensor's bits: any single changed bit changes it, at memory speed."""
    bits = (tensor.detach().view(_WHOLE[tensor.element_size()]) for _, tensor in params)
    return tuple(int(part.sum(dtype=torch.int64)) for part in bits)
