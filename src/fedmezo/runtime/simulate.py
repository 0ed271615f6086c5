"""The loop of a run on one machine: one model per process in memory, whatever the number of clients.

    for report in simulate(algorithm, bench, journal=journal, clients=clients, rounds=20, evaluate=evaluate):
        print(report.round, report.loss)

Every task and reply goes through its wire bytes and every round is journaled before the caller sees it, so the caller
may stop, or be stopped, at any point and go on later with the same bits. Where other processes walk, they are in the
next round by the time this one is judged, journaled and shown; what they have done of it then is simply done again.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Generic, TypeGuard, TypeVar

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Algorithm, Task
from fedmezo.fl.whole import is_whole
from fedmezo.runtime.events import absences, oddities, sums_of
from fedmezo.runtime.guard import Guard, OnSurge
from fedmezo.runtime.journal import LOOK, SLOW, Entry, Journal, Round, replay, update_of
from fedmezo.runtime.lookout import Lookout
from fedmezo.runtime.meter import Stopwatch
from fedmezo.runtime.pace import Look, factor_of, line, mean, rose, start_of, stays_up
from fedmezo.runtime.progress import RoundReport, report_of
from fedmezo.runtime.pull import Downlink, Offer, Tell, catch_up_
from fedmezo.runtime.taken import taken
from fedmezo.runtime.walkers import Here, MeteredBench, Walked, Walkers, checksum
from fedmezo.runtime.wire import Sums, decode_task, encode_task
from fedmezo.zo.noise import Law
from fedmezo.zo.params import Saved
from fedmezo.zo.perturb import apply_

__all__ = ["MeteredBench", "RoundReport", "Simulation", "simulate"]

S = TypeVar("S")
Evaluate = Callable[[], Mapping[str, Mapping[str, float]]]
_SLOWEST = 2.0**-24
_BACK, _AGAIN = 0.5, 0.25  # the factor on the rate after a rollback, and after a further one
_SURGE = "surge"
START = -1  # the round number under which the untrained model's evaluation is kept


@dataclass(frozen=True)
class _Sent:
    """The tasks of a round, on their way.

    Attributes:
      number: the round.
      tasks: one per client.
      sizes: wire bytes of each task and of what brought its client up to date.
      waits: what to call for the replies, group by group.
      before: checksum of the model the clients got.
      seconds: what it took to send them, without walks.
    """

    number: int
    tasks: Sequence[Task]
    sizes: Sequence[int]
    waits: Sequence[Callable[[], Walked]]
    before: tuple[int, ...]
    seconds: float


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
      walkers: who does the walks; None for this process.
      lookout: the batches that are judged again and again, and when; None for none.
      look: what they showed so far; None without a lookout.
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
    walkers: Walkers | None = None
    lookout: Lookout | None = None
    look: Look | None = field(init=False, default=None)
    state: S = field(init=False)
    guard: Guard = field(init=False, default_factory=Guard)
    _down: Downlink = field(init=False)
    _spent: Counter[str] = field(init=False)
    _start: Saved | None = field(init=False, default=None)
    _walkers: Walkers = field(init=False)

    def __post_init__(self) -> None:
        """Brings parameters, state and guard to where the journal ends."""
        self._walkers = self.walkers or Here(self.algorithm.client, self.bench)
        rounded = self.downlink is not None and self.downlink.coding != "float32"
        if self.on_surge == "rollback" or rounded:
            self._start = Saved(self.bench.params)
        self._restore_()
        if self.on_surge == "rollback" and self._unanswered():
            self._roll_back_()

    def _unanswered(self) -> bool:
        """Whether the last round surged and the run was stopped before it went back."""
        last = self.journal.last
        answered = any(number == last for number, _, _ in self.journal.events(SLOW))
        return last > 0 and not answered and _SURGE in dict(self.journal.round(last - 1).events)

    def _restore_(self) -> None:
        replay(self.bench.params, self.journal)
        self.state, self.guard, self._spent = self.algorithm.init(), Guard(), Counter()
        self._down = (self.downlink or Downlink(self.bench.params.dim)).afresh(recall=self.journal.round)
        for done in self.journal.rounds():
            tasks, replies = [entry.task for entry in done.entries], [entry.reply for entry in done.entries]
            self.state, _ = self.algorithm.aggregate(self.state, tasks, replies)
            if not _hidden(done.entries, done.loss):
                self.guard, _ = self.guard.observe(done.round, done.loss)
            self._remember(done)
        # What was walked has the rates of its tasks; only those to come are to be slowed.
        self._slow_(self.journal.slowed())
        looks = [detail for _, _, detail in self.journal.events(LOOK)]
        self.look = Look.from_json(looks[-1]) if looks else None

    def _slow_(self, factor: float) -> None:
        if factor != 1:
            self.state = self.algorithm.slow_down(self.state, factor)

    def _remember(self, done: Round) -> None:
        self._down.remember(done)
        self._spent.update(_spent(done))

    @property
    def _exhausted(self) -> bool:
        return any(self._spent[name] >= amount for name, amount in self.budget.items())

    def run(self) -> Iterator[RoundReport]:
        """Yields one report per round still to do; the untrained model is evaluated first, once per run."""
        if self.journal.last == 0:
            known = any(number == START for number, _, _ in self.journal.evaluations())
            self.journal.record_evaluations(START, {} if known else self.evaluate())
        if self.lookout is not None and self.look is None and self._wanted(self.journal.last):
            self.look = start_of(self.journal.last, self.lookout.losses())
        sent: _Sent | None = None
        while sent is not None or self._wanted(self.journal.last):
            done = self._receive(sent or self._send(self.journal.last))
            looks = self.lookout is not None and self.lookout.pace.looks(done.round + 1)
            done = self._looked(done, self.lookout) if self.lookout is not None and looks else done
            surged = _SURGE in dict(done.events)
            # After a surge the next round depends on what is done about it; else only judging and writing are left.
            ahead = self._walkers.apart and not surged and self._wanted(done.round + 1)
            sent = self._send(done.round + 1) if ahead else None
            if not self._wanted(done.round + 1) or (done.round + 1) % self.every == 0:
                done = replace(done, evaluations=self.evaluate(), digest=self.bench.params.digest())
            self.journal.append(done)
            self._react_(surged=surged)
            yield report_of(done, self.rounds)

    def _looked(self, done: Round, lookout: Lookout) -> Round:
        """Judges the fixed batches after a round; returns it with what came of that, and sets the rate of the next."""
        if self.look is None:
            raise RunError("The run is looked at before it began, a bug; please report it.")
        at, losses, events, spent = done.round + 1, lookout.losses(), list(done.events), len(lookout.places)
        worse = rose(losses, self.look.lowest) or stays_up(self.look.losses, losses, self.look.lowest)
        if worse and _SURGE not in dict(events):
            rise = f"from {mean(self.look.lowest):.4g} to {mean(losses):.4g}"
            events += self._surge(f"the loss on {spent} fixed batches rose {rise}")
        elif lookout.pace.sets_rate(at) and _SURGE not in dict(events):
            since = [*map(self.journal.round, range(self.look.at, done.round)), done]
            updates = list(map(update_of, since))
            seen = line(lambda c: lookout.stretched(updates, by=c), before=self.look.losses, after=losses)
            factor, spent = factor_of(seen, done=at, rounds=self.rounds), spent * (len(seen) - 1)
            self._slow_(factor)
            events += [(SLOW, repr(factor))] * (factor != 1)
        self.look = self.look.then(at, losses, forwards=spent)
        return replace(done, events=(*events, (LOOK, self.look.to_json())))

    def _surge(self, text: str) -> list[tuple[str, str]]:
        """Returns the events of a surge, and of what is done about it at once."""
        return [(_SURGE, text), *([(SLOW, "0.5")] if self.on_surge == "halve" else [])]

    def _wanted(self, number: int) -> bool:
        return number < self.rounds and not self._exhausted

    def _react_(self, *, surged: bool) -> None:
        if surged and self.on_surge == "rollback":
            self._roll_back_()
        elif surged and self.on_surge == "halve":
            self.state = self.algorithm.slow_down(self.state, 0.5)

    def _send(self, number: int) -> _Sent:
        """Plans a round and gives its tasks to the walkers, each through its bytes."""
        there = self._walkers.there(self.clients)
        watch, before = Stopwatch(), checksum(self.bench.params)
        planned = self.algorithm.plan(self.state, there)
        sums = self.algorithm.sums(self.state)
        offers, tell = self._down.offers(planned, sums), self._down.tell(planned, sums)
        sent = [encode_task(task) for task in planned]
        tasks = [decode_task(data)[0] for data in sent]
        sizes = [len(data) + offer.bytes for data, offer in zip(sent, offers, strict=True)]
        seconds = watch.lap()
        return _Sent(number, tasks, sizes, list(self._begin(tasks, offers, tell)), before, seconds)

    def _begin(self, tasks: Sequence[Task], offers: Sequence[Offer], tell: Tell) -> Iterator[Callable[[], Walked]]:
        """Yields what waits for replies; clients who pull sums in 16 bits walk from the model these sums make."""
        if self._walkers.distant:
            yield self._walkers.start(tasks, self.bench.params, tell)
            return
        plain = [t for t, offer in zip(tasks, offers, strict=True) if not _rounded(offer.content)]
        pulled = [(t, offer.content) for t, offer in zip(tasks, offers, strict=True) if _rounded(offer.content)]
        if plain:
            yield self._walkers.start(plain, self.bench.params, tell)
        if pulled:
            with self._made_of(pulled[0][1], law=pulled[0][0].law):
                yield self._walkers.start([task for task, _ in pulled], self.bench.params, tell)

    def _receive(self, sent: _Sent) -> Round:
        """Takes the replies, each through its bytes, and moves the model; returns the round, not yet judged."""
        walked = [wait() for wait in sent.waits]
        watch = Stopwatch()
        if checksum(self.bench.params) != sent.before:
            raise RunError(f"Round {sent.number}: the clients changed the shared model, a bug; please report it.")
        entries = self._entries(sent, walked)
        finite = [entry.reply.loss for entry in entries if math.isfinite(entry.reply.loss) and entry.weight]
        loss = fmean(finite) if finite else math.nan
        surged = False
        if not _hidden(entries, loss):
            self.guard, surged = self.guard.observe(sent.number, loss)
        asked = [entry.task for entry in entries if not is_whole(entry.task)] or sent.tasks
        done = Round(
            round=sent.number,
            entries=tuple(entries),
            loss=loss,
            rate=fmean(task.rate for task in asked),
            slowed=self.journal.slowed(),
            seconds=sent.seconds + sum(one.seconds for one in walked) + watch.lap(),
            forwards=sum(one.forwards for one in walked),
            tokens=sum(one.tokens for one in walked),
            events=(
                *absences(walked),
                *sums_of(sent.tasks, walked),
                *oddities(entries),
                *self.algorithm.remarks(self.state),
                *(self._surge(_surged(loss)) if surged else ()),
            ),
        )
        self._remember(done)
        return done

    def _entries(self, sent: _Sent, walked: Sequence[Walked]) -> list[Entry]:
        """Adds the replies to the model; returns who answered what, at which weight and size."""
        asked, answers, sizes = taken(sent.tasks, sent.sizes, walked)
        tasks, replies = self.algorithm.gather(asked, answers)
        self.state, update = self.algorithm.aggregate(self.state, tasks, replies)
        apply_(self.bench.params, update, law=sent.tasks[0].law)
        weights = dict(zip(sorted(reply.client for reply in replies), update.weights, strict=True))
        by_client = {reply.client: reply for reply in replies}
        return [
            Entry(task, by_client[task.client], weights[task.client], *sizes.get(task.client, (0, 0)))
            for task in tasks
            if task.client in by_client
        ]

    @contextmanager
    def _made_of(self, sums: Sums, *, law: Law) -> Iterator[None]:
        """Lends a scope in which the model is the base plus `sums`, which are the same for all clients of a round."""
        now = self.bench.params.clone()
        if self._start is not None:
            self._start.restore_(self.bench.params)
        catch_up_(self.bench.params, sums, law=law)
        try:
            yield
        finally:
            self.bench.params.copy_(now)

    def _roll_back_(self) -> None:
        """Goes back to the best round, to half the rate or less; a kill on the way only means that it surges again."""
        slowed, look, done = self.journal.slowed(), self.look, self.journal.last
        best = self.guard.best if look is None else look.best
        factor = (_AGAIN if look is not None and look.undone else _BACK) * slowed
        if factor < _SLOWEST:
            raise RunError(f"The loss keeps surging even at {slowed:.1g} of the rate; choose a much lower rate.")
        # The rollback may take earlier "slow" events with it; their factor stays in force.
        later = look.back(done).to_json() if look is not None else None
        self.journal.rollback(best, "loss surge", slowed=factor, look=later)
        if self._start is not None:
            self._start.restore_(self.bench.params)
        self._restore_()


def _hidden(entries: Sequence[Entry], loss: float) -> bool:
    """Whether a round's loss is unknown because clients do not tell it, though they walked."""
    return math.isnan(loss) and any(math.isfinite(slope) for entry in entries for slope in entry.reply.slopes)


def _surged(loss: float) -> str:
    return f"training loss surged to {loss:.4g}"


def _rounded(content: object) -> TypeGuard[Sums]:
    return isinstance(content, Sums) and content.coding != "float32"


def _spent(done: Round) -> dict[str, float]:
    moved = sum(entry.bytes_up + entry.bytes_down for entry in done.entries)
    return {"rounds": 1, "forwards": done.forwards, "tokens": done.tokens, "seconds": done.seconds, "bytes": moved}


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
    walkers: Walkers | None = None,
    lookout: Lookout | None = None,
) -> Iterator[RoundReport]:
    """Yields one report per round of a run, starting or going on where the journal ends; see `Simulation`."""
    settings = (evaluate, every, on_surge, downlink, budget, walkers, lookout)
    return Simulation(algorithm, bench, journal, clients, rounds, *settings).run()
