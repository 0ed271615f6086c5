"""How a client gets the model it shall walk from: the steps it missed, the K sums of a pool, or every parameter.

    pairs   4 bytes per slope (fewer when coded) of every round since the client's last; any algorithm of walks
    sums    4 bytes per candidate seed, whatever the number of rounds; needs the base and a pool
    dense   4 bytes per trained parameter; always possible

In exact arithmetic all three give the same model. A client that replays pairs takes the server's own path, to the bit.
Sums are rounded to float32 once and the model once, while the path rounds once per round: after R rounds the two differ
by at most (R + 2) / 2 float32 units of each parameter, plus 2**-24 of the sum of |sums[j] z_j|.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedmezo.fl.algorithm import Task
from fedmezo.fl.pool import pool_seed
from fedmezo.fl.walk import walk_of
from fedmezo.runtime.records import Entry, Round
from fedmezo.runtime.wire import News, Sums, encode_task
from fedmezo.zo.coding import SumsCoding
from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import add_sum_, apply_
from fedmezo.zo.seedsum import SeedSum, Update

__all__ = ["Cost", "Downlink", "Offer", "Pull", "Tell", "catch_up_", "cheapest"]

Pull = Literal["pairs", "sums", "dense"]
RECENT = 256  # rounds whose walks stay in memory where all rounds are kept
NOISE_PER_SECOND = 1e9  # entries of directions a client adds per second; one core of the machines measured does 1.3e9


@dataclass(frozen=True, slots=True)
class Cost:
    """What a pull costs a client.

    Attributes:
      bytes: what it downloads.
      entries: entries of directions it generates.
    """

    bytes: int
    entries: int

    def seconds(self, bandwidth: float) -> float:
        """Returns the time at `bandwidth` MB/s."""
        return self.bytes / (bandwidth * 1e6) + self.entries / NOISE_PER_SECOND


def cheapest(costs: Mapping[Pull, Cost], *, bandwidth: float) -> Pull:
    """Returns the pull that takes least time at `bandwidth` MB/s; of equal ones the first."""
    return min(costs, key=lambda kind: costs[kind].seconds(bandwidth))


@dataclass(frozen=True, slots=True)
class Offer:
    """What goes with a task.

    Attributes:
      kind: the kind of pull.
      content: news or sums; a dense pull's content is the model itself.
      bytes: what it adds to the task's own wire bytes.
    """

    kind: Pull
    content: tuple[News, ...] | Sums = ()
    bytes: int = 0


# How many rounds a client's model has behind it -> what brings it up to date.
Tell = Callable[[int], Offer]
# The number of a round that was remembered -> that round, from where it was kept.
Recall = Callable[[int], Round]


@dataclass
class Downlink:
    """What the server keeps to bring clients up to date: as many past rounds as are cheaper than the alternatives.

    Attributes:
      dim: trained parameters d.
      pull: how clients pull; "auto" for whichever is cheapest.
      coding: number format of sums.
      bandwidth: a client's download in MB/s.
      recall: where older rounds are read again, with "pairs", which never forgets one; None keeps all in memory.
    """

    dim: int
    pull: Pull | Literal["auto"] = "auto"
    coding: SumsCoding = "float32"
    bandwidth: float = 1.25
    recall: Recall | None = None
    _news: deque[News] = field(init=False, default_factory=deque)
    _totals: list[tuple[int, int]] = field(init=False, default_factory=lambda: [(0, 0)])
    _first: int = field(init=False, default=0)
    _seen: dict[int, int] = field(init=False, default_factory=dict)

    def afresh(self, *, recall: Recall | None = None) -> "Downlink":
        """Returns one with the same settings that has seen nothing yet."""
        return Downlink(self.dim, self.pull, self.coding, self.bandwidth, recall)

    @property
    def kept(self) -> int:
        """The number of past rounds that clients can be told."""
        return len(self._totals) - 1

    @property
    def in_memory(self) -> int:
        """The number of past rounds whose walks are in memory."""
        return len(self._news)

    def remember(self, done: Round) -> None:
        """Takes a finished round in, and forgets rounds that nobody would replay any more."""
        for entry in done.entries:
            self._seen[entry.task.client] = done.round  # it walked from the model with so many rounds behind it
        task = next((entry.task for entry in _counting(done)), None)
        if task is None or task.method != "walk" or task.dense:
            return
        news = _news_of(done)
        self._news.append(news)
        size, slopes = self._totals[-1]
        size += len(encode_task(task, [news])) - len(encode_task(task))
        self._totals.append((size, slopes + sum(map(len, news.slopes))))
        if self.pull != "pairs":
            self._forget(task.pool)
        elif self.recall is not None and len(self._news) > RECENT:
            self._news.popleft()

    def _forget(self, pool: int) -> None:
        limits = [self._dense_cost(), *([Cost(4 * pool, pool * self.dim)] if pool else [])]
        limit = min(cost.seconds(self.bandwidth) for cost in limits)
        while self.kept and self._pairs_cost(0).seconds(self.bandwidth) > limit:
            del self._totals[0]
            self._first += 1
        while len(self._news) > self.kept:
            self._news.popleft()

    def offers(self, tasks: Sequence[Task], sums: NDArray[np.float64] | None) -> list[Offer]:
        """Returns what brings each task's client up to date if it heard of the last round it took part in.

        Clients who miss the same rounds get the same object.

        Args:
          tasks: the tasks of one round.
          sums: the model minus its base by candidate seed; None when directions are fresh.
        """
        tell = self.tell(tasks, sums)
        return [tell(self._seen.get(task.client, 0)) for task in tasks]

    def tell(self, tasks: Sequence[Task], sums: NDArray[np.float64] | None) -> Tell:
        """Returns what says which offer brings a client up to date, for any number of rounds it has; as `offers`."""
        if not tasks or tasks[0].method != "walk" or tasks[0].dense:
            return lambda held: Offer("dense", bytes=self._dense_cost().bytes)
        packed, size = self._packed(tasks[0], sums)

        @cache
        def offer(held: int) -> Offer:
            # Who has rounds that are not there any more begins anew.
            since = held if held <= self._first + self.kept else 0
            return self._offer(since - self._first, packed, size)

        return offer

    def _packed(self, task: Task, sums: NDArray[np.float64] | None) -> tuple[Sums | None, int]:
        """Returns the sums as they travel, the same for all clients of a round, and their bytes."""
        if sums is None:
            return None, 0
        packed = Sums(task.seed, task.pool, self.coding, tuple(sums.tolist()))
        return packed, len(encode_task(task, packed)) - len(encode_task(task))

    def _offer(self, since: int, packed: Sums | None, size: int) -> Offer:
        costs: dict[Pull, Cost] = {"pairs": self._pairs_cost(since)} if since >= 0 else {}
        if packed is not None:
            costs["sums"] = Cost(size, sum(map(bool, packed.values)) * self.dim)
        costs["dense"] = self._dense_cost()
        kind = cheapest(costs, bandwidth=self.bandwidth) if self.pull == "auto" else self.pull
        if kind == "sums" and packed is not None:
            return Offer(kind, packed, size)
        if kind == "pairs":
            return Offer(kind, self._since(since), costs["pairs"].bytes)
        return Offer("dense", bytes=costs["dense"].bytes)

    def _since(self, since: int) -> tuple[News, ...]:
        """Returns the news of all rounds kept but the first `since`; those not in memory any more are recalled."""
        begin = self.kept - len(self._news)
        recall, first = self.recall, self._first
        older = [_news_of(recall(first + place)) for place in range(since, begin)] if recall is not None else []
        return (*older, *islice(self._news, max(0, since - begin), None))

    def _pairs_cost(self, since: int) -> Cost:
        (size, slopes), (known, seen) = self._totals[-1], self._totals[since]
        return Cost(size - known, (slopes - seen) * self.dim)

    def _dense_cost(self) -> Cost:
        return Cost(4 * self.dim, 0)


def _counting(done: Round) -> Sequence[Entry]:
    # What counts nothing changes nothing; but a round without any walk cannot be told.
    return [entry for entry in done.entries if entry.weight] or done.entries[:1]


def _news_of(done: Round) -> News:
    told = _counting(done)
    tasks, slopes = tuple(entry.task for entry in told), tuple(entry.reply.slopes for entry in told)
    return News(tasks, slopes, tuple(entry.weight for entry in told))


def catch_up_(params: Params, content: Sequence[News] | Sums, *, law: Law) -> None:
    """Brings `params` up to date in place: the model a client last had, by pairs; or the base, by a pool's sums."""
    if isinstance(content, Sums):
        terms = ((pool_seed(content.seed, place), value) for place, value in enumerate(content.values) if value)
        add_sum_(params, SeedSum.of(terms), law=law)
        return
    for item in content:
        walks = tuple(walk_of(task, slopes) for task, slopes in zip(item.tasks, item.slopes, strict=True))
        apply_(params, Update(walks, item.weights, item.tasks[0].round), law=law)
