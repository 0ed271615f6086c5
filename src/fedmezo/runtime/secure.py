"""Walkers of whom the server sees the mean only: behind a network by secure aggregation, or here in the clear.

A round of `Secure` is one mean over a line that can take one. A client that fails on the way is left out of it, when
enough others stay; if they do not, nobody's share is known and the round is asked for again. What a client's model
lacks is sent by what is known of it; one that is behind fails, is greeted again, and has it in the next round.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Task
from fedmezo.fl.share import numbers_of, passes_of, share_of, summed
from fedmezo.fl.whole import WHOLE
from fedmezo.runtime.calls import Addend, check_of, encode_request
from fedmezo.runtime.distant import Distant
from fedmezo.runtime.line import FEWEST, Mean, SecureLine
from fedmezo.runtime.packing import Packing
from fedmezo.runtime.pull import Tell
from fedmezo.runtime.walkers import Absence, Walked, Walkers
from fedmezo.zo.params import Params

__all__ = ["InTheClear", "Secure"]

_PAUSE = 2.0  # seconds before a round is asked for again


@dataclass(frozen=True)
class InTheClear:
    """Walkers whose replies are put together as a secure sum would, up to its rounding; hides nothing.

    Attributes:
      inner: who walks.
    """

    inner: Walkers
    distant = False

    @property
    def apart(self) -> bool:
        """Whether they walk while the caller does something else."""
        return self.inner.apart

    def there(self, clients: Sequence[int]) -> Sequence[int]:
        """Returns those of the clients that can be asked now."""
        return self.inner.there(clients)

    def start(self, tasks: Sequence[Task], params: Params, tell: Tell) -> Callable[[], Walked]:
        """Begins the walks; returns what waits for them and gives their mean."""
        wait = self.inner.start(tasks, params, tell)

        def mean() -> Walked:
            walked = wait()
            shares = [share_of(task, reply) for task, reply in zip(tasks, walked.replies, strict=True)]
            nobodys, reply = summed(tasks, np.mean(shares, axis=0, dtype=np.float64))
            return Walked((reply,), walked.forwards, walked.tokens, walked.seconds, tasks=(nobodys,))

        return mean


@dataclass(kw_only=True)
class Secure(Distant):
    """Clients on other machines, of whom only the mean is learnt; a `Walkers`.

    Attributes:
      line: the way to them.
    """

    line: SecureLine
    apart: bool = False

    def start(self, tasks: Sequence[Task], params: Params, tell: Tell) -> Callable[[], Walked]:
        """Returns what asks the clients of the tasks to walk from `params`, and waits for the mean."""
        return _Meaning(self, tasks, params, tell).wait

    def _quorum(self, asked: int) -> int:
        return max(FEWEST, self.least(asked))

    def least(self, asked: int) -> int:
        """Returns how many of those asked have to be in a mean: the quorum, and more than half."""
        return min(max(asked // 2 + 1, self.terms.quorum or 0), asked)


class _Meaning:
    """One round: its tasks, and what became of them."""

    def __init__(self, owner: Secure, tasks: Sequence[Task], params: Params, tell: Tell) -> None:
        self._owner = owner
        self._tasks, self._numbers = {task.client: task for task in tasks}, numbers_of(tasks[0])
        self._packing = Packing(tell, params, check=check_of(owner.roster.hello.run, params.digest()))
        self._began = time.monotonic()
        self._why: dict[int, str] = {}
        self._lost: frozenset[int] = frozenset()
        self._down = self._up = 0

    def wait(self) -> Walked:
        """Returns the mean of the walks.

        Raises:
          RunError: the patience was over before enough clients stayed from the first exchange to the last.
        """
        owner, terms = self._owner, self._owner.terms
        least = owner.least(len(self._tasks))
        while True:
            owner.roster.greet()
            nodes = self._nodes(max(FEWEST, least))
            if len(nodes) >= max(FEWEST, least):
                requests, exact = self._requests(nodes)
                mean = owner.line.mean(requests, numbers=self._numbers, enough=least, deadline=terms.deadline)
                took = self._taken(mean, nodes, exact)
                if took:
                    return self._walked(mean, took)
            if time.monotonic() - self._began > max(terms.patience, terms.deadline):
                raise RunError(self._short_of(least))
            time.sleep(_PAUSE)

    def _nodes(self, enough: int) -> dict[int, int]:
        """Returns node -> client, of those who are there; without those lost the last time, where that is enough."""
        seats = self._owner.roster.there()
        self._why |= {client: "is not there" for client in self._tasks if client not in seats}
        there = {seats[client].node: client for client in self._tasks if client in seats}
        others = {node: client for node, client in there.items() if client not in self._lost}
        return others if len(others) >= enough else there

    def _requests(self, nodes: dict[int, int]) -> tuple[dict[int, bytes], dict[int, bool]]:
        requests, exact = {}, {}
        for node, client in nodes.items():
            seat, task = self._owner.roster.seats[client], self._tasks[client]
            walk, exact[node] = self._packing.walk(task, seat.held, exact=seat.exact)
            requests[node] = encode_request(Addend(walk.check, walk.task))
        return requests, exact

    def _taken(self, mean: Mean, nodes: dict[int, int], exact: dict[int, bool]) -> list[Task]:
        """Notes what came of everyone; returns the tasks of those in the mean, in client order."""
        self._down += sum(down for down, _ in mean.sizes.values())
        self._up += sum(up for _, up in mean.sizes.values())
        self._lost = frozenset(nodes[node] for node in mean.failed)
        for node, client in nodes.items():
            if node in mean.failed:
                self._why[client] = f"failed ({mean.failed[node]})"
                self._owner.roster.again(client)  # its model may be another than was thought
            elif node in mean.took:
                self._why.pop(client, None)
                self._owner.roster.holds(client, self._tasks[client].round, exact=exact[node])
        took = {nodes[node] for node in mean.took}
        return [task for client, task in self._tasks.items() if client in took]

    def _walked(self, mean: Mean, took: Sequence[Task]) -> Walked:
        if mean.values is None:
            raise RunError("A mean came without its values, a bug; please report it.")
        nobodys, reply = summed(took, mean.values)
        there = {task.client for task in took}
        return Walked(
            (reply,),
            forwards=sum(map(passes_of, took)),
            seconds=time.monotonic() - self._began,
            absent=tuple(
                Absence(client, "failed", f"client {client} {self._why.get(client, 'did not stay to the end')}")
                for client in self._tasks
                if client not in there
            ),
            sizes={WHOLE: (self._down, self._up)},
            tasks=(nobodys,),
        )

    def _short_of(self, least: int) -> str:
        number, asked = next(iter(self._tasks.values())).round, len(self._tasks)
        reasons = "; ".join(f"client {client} {why}" for client, why in sorted(self._why.items()))
        return (
            f"Round {number}: fewer than {max(FEWEST, least)} of {asked} clients began, or fewer than {least} stayed "
            f"until their sum was unmasked ({reasons or 'no reason is known'}); every finished round is in the "
            "journal: mend that and go on with `fedmezo server --resume`."
        )
