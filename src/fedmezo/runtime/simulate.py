"""The in-process engine: every client in this process, one model in memory whatever their number.

    for report in simulate(algorithm, bench, journal, clients=clients, rounds=20, evaluate=evaluate):
        print(report.round, report.loss)

Every message goes through its wire bytes and every round is journaled before the caller sees it, so the caller may
stop, or be stopped, at any point and go on later with the same bits.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Generic, Protocol, TypeGuard, TypeVar

import torch

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Algorithm, Bench, Reply, Task
from fedmezo.runtime.guard import Guard, OnSurge
from fedmezo.runtime.journal import SLOW, Entry, Journal, Round, replay
from fedmezo.runtime.meter import Stopwatch
from fedmezo.runtime.progress import RoundReport, report_of
from fedmezo.runtime.pull import Downlink, Offer, catch_up_
from fedmezo.runtime.wire import Sums, decode_reply, decode_task, encode_reply, encode_task
from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import apply_

__all__ = ["MeteredBench", "RoundReport", "Simulation", "simulate"]

S = TypeVar("S")
Evaluate = Callable[[], Mapping[str, Mapping[str, float]]]
_SLOWEST = 2.0**-20
_SURGE = "surge"
START = -1  # the round number under which the untrained model's evaluation is kept


class MeteredBench(Bench, Protocol):
    """A bench that counts its work."""

    forwards: int
    tokens: int


@dataclass
class Simulation(Generic[S]):
    """A run in progress: explicit state in one place, rebuilt from the journal at the start.

    Attributes:
      algorithm: the algorithm.
      bench: the base model with the current parameters; must hold the untrained parameters when passed in.
      journal: the run's journal; rounds already in it are replayed.
      clients: the client numbers.
      rounds: rounds the run shall have.
      evaluate: returns split -> metrics of the current model.
      every: evaluate every so many rounds, and after the last.
      on_surge: what the guard does.
      downlink: how clients get the model; None for the cheapest way at 10 Mbit/s.
      budget: the run also ends after the first round at which one of these is spent: rounds, forwards, tokens, seconds,
        bytes.
    """

    algorithm: Algorithm[S]
    bench: MeteredBench
    journal: Journal
    clients: Sequence[int]
    rounds: int
    evaluate: Evaluate
    every: int = 5
    on_surge: OnSurge = "halve"
    downlink: Downlink | None = None
    budget: Mapping[str, float] = field(default_factory=dict)
    state: S = field(init=False)
    guard: Guard = field(init=False, default_factory=Guard)
    _down: Downlink = field(init=False)
    _spent: Counter[str] = field(init=False)
    _start: Params | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Brings parameters, state and guard to where the journal ends."""
        rounded = self.downlink is not None and self.downlink.coding != "float32"
        if self.on_surge == "rollback" or rounded:
            self._start = self.bench.params.clone()
        self._restore_()
        unfinished = self.journal.last > 0 and _SURGE in dict(self.journal.round(self.journal.last - 1).events)
        if unfinished and self.on_surge == "rollback":
            self._roll_back_()

    def _restore_(self) -> None:
        replay(self.bench.params, self.journal)
        self.state, self.guard, self._spent = self.algorithm.init(), Guard(), Counter()
        self._down = self.downlink.afresh() if self.downlink is not None else Downlink(self.bench.params.dim)
        for done in self.journal.rounds():
            replies = [entry.reply for entry in done.entries]
            self.state, _ = self.algorithm.aggregate(self.state, replies)
            self.guard, _ = self.guard.observe(done.round, done.loss)
            self._remember(done)
        self.state = self.algorithm.slow_down(self.state, self.journal.slowed())

    def _remember(self, done: Round) -> None:
        self._down.remember(done)
        self._spent.update(_spent(done))

    @property
    def _exhausted(self) -> bool:
        return any(self._spent[name] >= amount for name, amount in self.budget.items())

    def run(self) -> Iterator[RoundReport]:
        """Yields one report per round still to do; the untrained model is evaluated first, once per run."""
        if self.journal.last == 0:
            known = {split for number, split, _ in self.journal.evaluations() if number == START}
            for split, metrics in self.evaluate().items() if not known else ():
                self.journal.record_evaluation(START, split, metrics)
        while self.journal.last < self.rounds and not self._exhausted:
            yield self._round()

    def _round(self) -> RoundReport:
        number, watch = self.journal.last, Stopwatch()
        forwards, tokens = self.bench.forwards, self.bench.tokens
        entries = self._exchange(number)
        spent = (watch.lap(), self.bench.forwards - forwards, self.bench.tokens - tokens)
        finite = [entry.reply.loss for entry in entries if math.isfinite(entry.reply.loss)]
        loss = fmean(finite) if finite else math.nan
        self.guard, surged = self.guard.observe(number, loss)
        done = Round(
            round=number,
            entries=tuple(entries),
            loss=loss,
            rate=fmean(entry.task.rate for entry in entries),
            slowed=self.journal.slowed(),
            seconds=spent[0],
            forwards=spent[1],
            tokens=spent[2],
            events=tuple(self._events(loss, entries, surged=surged)),
        )
        self._remember(done)
        if number + 1 == self.rounds or (number + 1) % self.every == 0 or self._exhausted:
            done = replace(done, evaluations=self.evaluate(), digest=self.bench.params.digest())
        self.journal.append(done)
        if surged and self.on_surge == "rollback":
            self._roll_back_()
        elif surged and self.on_surge == "halve":
            self.state = self.algorithm.slow_down(self.state, 0.5)
        return report_of(done, self.rounds)

    def _exchange(self, number: int) -> list[Entry]:
        """Sends the tasks, takes the replies, moves the model; every message passes through its bytes."""
        before = _checksum(self.bench.params)
        tasks = self.algorithm.plan(self.state, self.clients)
        offers = [self._down.offer(task, self.algorithm.sums(self.state)) for task in tasks]
        sent = [encode_task(task, offer.content) for task, offer in zip(tasks, offers, strict=True)]
        answers = self._answers([decode_task(data)[0] for data in sent], offers)
        if _checksum(self.bench.params) != before:
            raise RunError(f"Round {number}: the clients changed the shared model; this is a bug, please report it.")
        received = [encode_reply(reply) for reply in answers]
        replies = [decode_reply(data) for data in received]
        dense = [4 * self.bench.params.dim if offer.kind == "dense" else 0 for offer in offers]
        self.state, update = self.algorithm.aggregate(self.state, replies)
        apply_(self.bench.params, update, law=tasks[0].law)
        weights = dict(zip(sorted(reply.client for reply in replies), update.weights, strict=True))
        by_client = {reply.client: (reply, len(data)) for reply, data in zip(replies, received, strict=True)}
        return [
            Entry(task, by_client[task.client][0], weights[task.client], len(data) + whole, by_client[task.client][1])
            for task, data, whole in zip(tasks, sent, dense, strict=True)
        ]

    def _answers(self, tasks: Sequence[Task], offers: Sequence[Offer]) -> list[Reply]:
        """Returns the clients' replies; those who pull sums in 16 bits walk from the model these sums make."""
        replies: list[Reply] = []
        plain = [t for t, offer in zip(tasks, offers, strict=True) if not _rounded(offer.content)]
        pulled = [(t, offer.content) for t, offer in zip(tasks, offers, strict=True) if _rounded(offer.content)]
        if plain:
            replies += self.algorithm.client(plain, self.bench)
        if pulled:
            with self._made_of(pulled[0][1], law=pulled[0][0].law):
                replies += self.algorithm.client([task for task, _ in pulled], self.bench)
        return replies

    @contextmanager
    def _made_of(self, sums: Sums, *, law: Law) -> Iterator[None]:
        """Lends a scope in which the model is the base plus `sums`, which are the same for all clients of a round."""
        now = self.bench.params.clone()
        if self._start is not None:
            self.bench.params.copy_(self._start)
        catch_up_(self.bench.params, sums, law=law)
        try:
            yield
        finally:
            self.bench.params.copy_(now)

    def _events(self, loss: float, entries: Sequence[Entry], *, surged: bool) -> Iterator[tuple[str, str]]:
        skipped = sum(entry.reply.skipped for entry in entries)
        if skipped:
            yield "skipped", f"{skipped} directions skipped: a loss was not finite; lower rate or mu, or use float32"
        slopes = [slope for entry in entries for slope in entry.reply.slopes]
        if slopes and not any(slopes):
            yield (
                "zero-slope",
                "every slope was 0: the loss does not depend on the trained parameters, or mu is too small",
            )
        if all(entry.task.rate == 0 for entry in entries):
            yield "zero-rate", "the learning rate was 0 for every client"
        if surged:
            yield _SURGE, f"training loss surged to {loss:.4g}"
            if self.on_surge == "halve":
                yield SLOW, "0.5"

    def _roll_back_(self) -> None:
        """Goes back to the best round and halves the rate; a kill on the way only means that the surge is met again."""
        slowed = self.journal.slowed()
        if 0.5 * slowed < _SLOWEST:
            raise RunError(f"The loss keeps surging even at {slowed:.1g} of the rate; choose a much lower rate.")
        self.journal.rollback(self.guard.best, "loss surge")
        # The rollback may have taken earlier "slow" events with it; their factor stays in force.
        self.journal.add_event(self.journal.last, SLOW, repr(0.5 * slowed / self.journal.slowed()))
        if self._start is not None:
            self.bench.params.copy_(self._start)
        self._restore_()


def _rounded(content: object) -> TypeGuard[Sums]:
    return isinstance(content, Sums) and content.coding != "float32"


def _spent(done: Round) -> dict[str, float]:
    moved = sum(entry.bytes_up + entry.bytes_down for entry in done.entries)
    return {"rounds": 1, "forwards": done.forwards, "tokens": done.tokens, "seconds": done.seconds, "bytes": moved}


def _checksum(params: Params) -> tuple[int, ...]:
    """Returns the sum of every tensor's bits: any single changed bit changes it, at memory speed."""
    return tuple(int(tensor.detach().view(torch.int32).sum(dtype=torch.int64)) for _, tensor in params)


def simulate(
    algorithm: Algorithm[S],
    bench: MeteredBench,
    *,
    journal: Journal,
    clients: Sequence[int],
    rounds: int,
    evaluate: Evaluate = dict,
    every: int = 5,
    on_surge: OnSurge = "halve",
    downlink: Downlink | None = None,
    budget: Mapping[str, float] = {},
) -> Iterator[RoundReport]:
    """Yields one report per round of a run, starting or going on where the journal ends; see `Simulation`."""
    return Simulation(algorithm, bench, journal, clients, rounds, evaluate, every, on_surge, downlink, budget).run()
