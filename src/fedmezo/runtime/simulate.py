"""The in-process engine: every client in this process, one model in memory whatever their number.

    for report in simulate(algorithm, bench, journal, clients=clients, rounds=20, evaluate=evaluate):
        print(report.round, report.loss)

Every message goes through its wire bytes and every round is journaled before the caller sees it, so the caller may
stop, or be stopped, at any point and go on later with the same bits.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Generic, Protocol, TypeVar

import torch

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Algorithm, Bench, Task
from fedmezo.runtime.guard import Guard, OnSurge
from fedmezo.runtime.journal import SLOW, Entry, Journal, Round, replay
from fedmezo.runtime.meter import Stopwatch
from fedmezo.runtime.wire import News, decode_reply, decode_task, encode_reply, encode_task
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


@dataclass(frozen=True)
class RoundReport:
    """What one round did, for people and plots.

    Attributes:
      round: its number, from 0.
      rounds: how many the run will have.
      loss: mean training loss over the cohort, nats.
      rate: mean learning rate over the cohort.
      clip: limit on |slope| in force; inf for none, 0 in the first round (each walk limits itself).
      bytes_up: wire bytes sent by the cohort.
      bytes_down: wire bytes sent to the cohort.
      seconds: wall clock, without evaluation.
      forwards: forward passes of the walks, one per point.
      tokens: tokens those passes read.
      skipped: slopes skipped because a loss was not finite.
      evaluations: split -> metrics, when this round was evaluated.
      events: (kind, detail) of guards and monitors.
      clients: client -> its loss, rate and bytes.
    """

    round: int
    rounds: int
    loss: float
    rate: float
    clip: float
    bytes_up: int
    bytes_down: int
    seconds: float
    forwards: int
    tokens: int
    skipped: int
    evaluations: Mapping[str, Mapping[str, float]]
    events: tuple[tuple[str, str], ...]
    clients: Mapping[int, Mapping[str, float]]


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
    """

    algorithm: Algorithm[S]
    bench: MeteredBench
    journal: Journal
    clients: Sequence[int]
    rounds: int
    evaluate: Evaluate
    every: int = 5
    on_surge: OnSurge = "halve"
    state: S = field(init=False)
    guard: Guard = field(init=False, default_factory=Guard)
    _start: Params | None = field(init=False, default=None)
    _news: list[News] = field(init=False, default_factory=list)
    _seen: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Brings parameters, state and guard to where the journal ends."""
        if self.on_surge == "rollback":
            self._start = self.bench.params.clone()
        self._restore_()
        unfinished = self.journal.last > 0 and _SURGE in dict(self.journal.round(self.journal.last - 1).events)
        if unfinished and self.on_surge == "rollback":
            self._roll_back_()

    def _restore_(self) -> None:
        replay(self.bench.params, self.journal)
        self.state, self.guard, self._news, self._seen = self.algorithm.init(), Guard(), [], {}
        for done in self.journal.rounds():
            replies = [entry.reply for entry in done.entries]
            self.state, _ = self.algorithm.aggregate(self.state, replies)
            self.guard, _ = self.guard.observe(done.round, done.loss)
            self._remember(done)
        self.state = self.algorithm.slow_down(self.state, self.journal.slowed())

    def _remember(self, done: Round) -> None:
        if done.entries and not done.entries[0].task.dense:
            slopes = tuple(entry.reply.slopes for entry in done.entries)
            tasks, weights = tuple(e.task for e in done.entries), tuple(e.weight for e in done.entries)
            self._news.append(News(tasks, slopes, weights))
        for entry in done.entries:
            self._seen[entry.task.client] = done.round  # it walked from the model with so many rounds behind it

    def run(self) -> Iterator[RoundReport]:
        """Yields one report per round still to do; the untrained model is evaluated first, once per run."""
        if self.journal.last == 0:
            known = {split for number, split, _ in self.journal.evaluations() if number == START}
            for split, metrics in self.evaluate().items() if not known else ():
                self.journal.record_evaluation(START, split, metrics)
        while self.journal.last < self.rounds:
            yield self._round()

    def _round(self) -> RoundReport:
        number, watch = self.journal.last, Stopwatch()
        forwards, tokens = self.bench.forwards, self.bench.tokens
        entries = self._exchange(number)
        spent = (watch.lap(), self.bench.forwards - forwards, self.bench.tokens - tokens)
        due = number + 1 == self.rounds or (number + 1) % self.every == 0
        evaluations = self.evaluate() if due else {}
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
            digest=self.bench.params.digest() if due else None,
            evaluations=evaluations,
            events=tuple(self._events(loss, entries, surged=surged)),
        )
        self.journal.append(done)
        self._remember(done)
        if surged and self.on_surge == "rollback":
            self._roll_back_()
        elif surged and self.on_surge == "halve":
            self.state = self.algorithm.slow_down(self.state, 0.5)
        return _report(done, self.rounds)

    def _exchange(self, number: int) -> list[Entry]:
        """Sends the tasks, takes the replies, moves the model; every message passes through its bytes."""
        before = _checksum(self.bench.params)
        tasks = self.algorithm.plan(self.state, self.clients)
        sent = [encode_task(task, self._catch_up(task)) for task in tasks]
        answers = self.algorithm.client([decode_task(data)[0] for data in sent], self.bench)
        if _checksum(self.bench.params) != before:
            raise RunError(f"Round {number}: the clients changed the shared model; this is a bug, please report it.")
        received = [encode_reply(reply) for reply in answers]
        replies = [decode_reply(data) for data in received]
        dense = 4 * self.bench.params.dim if tasks[0].dense else 0
        self.state, update = self.algorithm.aggregate(self.state, replies)
        apply_(self.bench.params, update, law=tasks[0].law)
        weights = dict(zip(sorted(reply.client for reply in replies), update.weights, strict=True))
        by_client = {reply.client: (reply, len(data)) for reply, data in zip(replies, received, strict=True)}
        return [
            Entry(task, by_client[task.client][0], weights[task.client], len(data) + dense, by_client[task.client][1])
            for task, data in zip(tasks, sent, strict=True)
        ]

    def _catch_up(self, task: Task) -> list[News]:
        """Returns what the model gained since this client last saw it; a dense task carries the whole model instead."""
        return [] if task.dense else self._news[self._seen.get(task.client, 0) :]

    def _events(self, loss: float, entries: Sequence[Entry], *, surged: bool) -> Iterator[tuple[str, str]]:
        skipped = sum(entry.reply.skipped for entry in entries)
        if skipped:
            yield "skipped", f"{skipped} directions skipped: a loss was not finite; lower rate or mu, or use float32"
        if all(slope == 0 for entry in entries for slope in entry.reply.slopes):
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


def _checksum(params: Params) -> tuple[int, ...]:
    """Returns the sum of every tensor's bits: any single changed bit changes it, at memory speed."""
    return tuple(int(tensor.detach().view(torch.int32).sum(dtype=torch.int64)) for _, tensor in params)


def _report(done: Round, rounds: int) -> RoundReport:
    clients = {
        entry.task.client: {
            "loss": entry.reply.loss,
            "rate": entry.task.rate,
            "bytes_up": float(entry.bytes_up),
            "bytes_down": float(entry.bytes_down),
        }
        for entry in done.entries
    }
    return RoundReport(
        round=done.round,
        rounds=rounds,
        loss=done.loss,
        rate=done.rate,
        clip=done.entries[0].task.clip,
        bytes_up=sum(entry.bytes_up for entry in done.entries),
        bytes_down=sum(entry.bytes_down for entry in done.entries),
        seconds=done.seconds,
        forwards=done.forwards,
        tokens=done.tokens,
        skipped=sum(entry.reply.skipped for entry in done.entries),
        evaluations=done.evaluations,
        events=done.events,
        clients=clients,
    )


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
) -> Iterator[RoundReport]:
    """Yields one report per round of a run, starting or going on where the journal ends; see `Simulation`."""
    return Simulation(algorithm, bench, journal, clients, rounds, evaluate, every, on_surge).run()
