"""What the live page keeps of a run: its rounds in a bounded number of rows, and exact sums beside them.

One row is one round until there are 400 of them. Then two neighbours become one row, later rows are gathered to the
same length, and so on: a line has 200 to 400 points, however many rounds a run has.
"""

import json
import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fedmezo.runtime.journal import Header, Round
from fedmezo.studies.facts import ClientRow, ClientTotal, Facts, Metrics, Row, privacy_in, row_of

__all__ = ["MOST_EVENTS", "MOST_ROWS", "Course", "Thinned"]

MOST_ROWS = 400
MOST_EVENTS = 200
# Of a larger cohort a row keeps so many losses, evenly spread: what a band and its quantiles are drawn from.
_CROWD, _SPREAD = 64, 33
_UNITS = ("rounds", "forwards", "tokens", "seconds", "bytes", "up", "down", "dense")
Spent = Mapping[str, float]


@dataclass(frozen=True)
class Thinned(Facts):
    """A run whose rows may stand for several rounds each.

    Attributes:
      after: what had been spent after the last round of each row, and after each evaluated round kept.
      sums: every client over the whole run.
      happened: (round, kind, detail) of the newest events, oldest first.
      done: rounds that were read.
      skipped: slopes that were skipped.
      lately: seconds, forward passes and rounds of about the last twenty rounds, at least the newest row.
    """

    after: Mapping[int, Spent] = field(default_factory=dict)
    sums: Mapping[int, ClientTotal] = field(default_factory=dict)
    happened: Sequence[tuple[int, str, str]] = ()
    done: int = 0
    skipped: int = 0
    lately: tuple[float, int, int] = (0.0, 0, 0)

    @cached_property
    def clients(self) -> tuple[int, ...]:
        """Every client that took part, in order."""
        return tuple(sorted(self.sums))

    def spent(self) -> dict[int, dict[str, float]]:
        """Returns what had been spent after the rounds that a chart may show."""
        weights = 4 * self.dim  # d is known only when start.json is there
        return {at: {**spent, "dense": weights * spent["dense"]} for at, spent in self.after.items()}

    def totals(self) -> dict[int, ClientTotal]:
        """Returns each client's sums over the whole run."""
        return dict(self.sums)


class Course:
    """A run as far as it was read; give it the rounds in order."""

    def __init__(self, header: Header) -> None:
        """Takes the journal's header; nothing is read yet."""
        self.header = header
        self.next = 0
        self._rows: list[Row] = []
        self._covers: list[int] = []  # rounds in each row
        self._stride = 1
        self._now: dict[str, float] = dict.fromkeys(_UNITS, 0.0)
        self._after: dict[int, Spent] = {-1: dict(self._now)}
        self._sums: dict[int, ClientTotal] = {}
        self._judged: dict[int, Mapping[str, Metrics]] = {}
        self._events: deque[tuple[int, str, str]] = deque(maxlen=MOST_EVENTS)
        self._skipped = 0
        self._last: Mapping[str, Any] = {"steps": 0, "mu": math.nan, "dense": False}
        self._privacy: Mapping[str, Any] = {}

    def add(self, done: Round) -> None:
        """Takes the next round."""
        row = row_of(done)
        self._count(row)
        self._events.extend((done.round, kind, detail) for kind, detail in done.news)
        if done.entries:
            task = done.entries[0].task
            self._last = {"steps": task.steps, "mu": task.mu, "dense": task.dense}
        self._privacy = privacy_in(done)
        self.next = done.round + 1
        self._take(replace(row, events=(), clients=_spread(row.clients)))
        self._after[done.round] = dict(self._now)
        self._forget()
        if done.evaluations:
            self.judge(done.round, done.evaluations)

    def judge(self, number: int, evaluations: Mapping[str, Metrics]) -> None:
        """Takes the evaluations of the model after a round; -1 is the untrained one."""
        self._judged[number] = evaluations
        if len(self._judged) > MOST_ROWS:
            kept = sorted(self._judged)
            self._judged = {at: self._judged[at] for at in [*kept[:-1:2], kept[-1]]}

    @property
    def begun(self) -> bool:
        """Whether the evaluation of the untrained model is known."""
        return -1 in self._judged

    def facts(self, summary: Mapping[str, object]) -> Thinned:
        """Returns what the page shows; `summary` is the run's, or what is known before its end."""
        config = json.loads(self.header.config or "{}")
        judged = ((at, name, metrics) for at, found in sorted(self._judged.items()) for name, metrics in found.items())
        return Thinned(
            header=self.header,
            config=config,
            rows=tuple(self._rows),
            evaluations=tuple(judged),
            summary=summary,
            **self._last,
            privacy=self._privacy,
            after=dict(self._after),
            sums=dict(self._sums),
            happened=tuple(self._events),
            done=self.next,
            skipped=self._skipped,
            lately=self._lately(),
        )

    def _lately(self) -> tuple[float, int, int]:
        seconds, forwards, rounds = 0.0, 0, 0
        for row, covers in zip(reversed(self._rows), reversed(self._covers), strict=True):
            seconds, forwards, rounds = seconds + row.seconds, forwards + row.forwards, rounds + covers
            if rounds >= 20:
                break
        return seconds, forwards, rounds

    def _count(self, row: Row) -> None:
        up, down = (sum(getattr(client, way) for client in row.clients.values()) for way in ("up", "down"))
        gain = (1, row.forwards, row.tokens, row.seconds, up + down, up, down, len(row.clients))
        self._now = {name: self._now[name] + more for name, more in zip(_UNITS, gain, strict=True)}
        nobody = ClientTotal(0, math.nan, math.nan, 0, 0, 0, 0)
        for client, new in row.clients.items():
            old = self._sums.get(client, nobody)
            loss = new.loss if math.isfinite(new.loss) else old.loss
            sums = (old.up + new.up, old.down + new.down, old.skipped + new.skipped, old.examples + new.examples)
            self._sums[client] = ClientTotal(old.rounds + 1, loss, new.rate, *sums)
            self._skipped += new.skipped

    def _take(self, row: Row) -> None:
        if self._rows and self._covers[-1] < self._stride:
            self._rows[-1] = _merged(self._rows[-1], row, self._covers[-1], 1)
            self._covers[-1] += 1
        else:
            self._rows.append(row)
            self._covers.append(1)
        if len(self._rows) > MOST_ROWS:
            self._halve()

    def _halve(self) -> None:
        rows, covers = self._rows, self._covers
        pairs = range(1, len(rows), 2)
        odd = len(rows) % 2
        self._rows = [_merged(rows[at - 1], rows[at], covers[at - 1], covers[at]) for at in pairs] + rows[-odd:] * odd
        self._covers = [covers[at - 1] + covers[at] for at in pairs] + covers[-odd:] * odd
        self._stride *= 2

    def _forget(self) -> None:
        """Drops what was spent after rounds that no chart shows any more."""
        if len(self._after) > 4 * MOST_ROWS:
            shown = {-1, self.next - 1, *(row.round for row in self._rows), *self._judged}
            self._after = {at: spent for at, spent in self._after.items() if at in shown}


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Returns the weighted mean of the finite values; nan when there is none."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if math.isfinite(value)]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else math.nan


def _most(values: Iterable[float], pick: Any = max) -> float:
    return float(pick((value for value in values if math.isfinite(value)), default=math.nan))


def _merged(a: Row, b: Row, covers: int, more: int) -> Row:
    """Returns one row for two neighbours, of so many rounds each: means over rounds, extremes, sums."""
    weights = (covers, more)
    clients = {client: a.clients.get(client) for client in [*a.clients, *b.clients]}
    return Row(
        round=b.round,
        loss=_mean((a.loss, b.loss), weights),
        rate=_mean((a.rate, b.rate), weights),
        rates=(_most((a.rates[0], b.rates[0]), min), _most((a.rates[1], b.rates[1]))),
        scale=_mean((a.scale, b.scale), weights),
        largest=_most((a.largest, b.largest)),
        clip=_mean((a.clip, b.clip), weights),
        seconds=a.seconds + b.seconds,
        forwards=a.forwards + b.forwards,
        tokens=a.tokens + b.tokens,
        digest=b.digest or a.digest,
        events=(),
        clients=_spread({at: _client(old, b.clients.get(at), weights) for at, old in clients.items()}),
    )


def _client(a: ClientRow | None, b: ClientRow | None, weights: Sequence[float]) -> ClientRow:
    if a is None or b is None:
        return a or b or ClientRow(math.nan, math.nan, 0, 0, 0, 0)
    sums = (a.up + b.up, a.down + b.down, a.skipped + b.skipped, a.examples + b.examples)
    return ClientRow(_mean((a.loss, b.loss), weights), b.rate, *sums)


def _spread(clients: Mapping[int, ClientRow]) -> Mapping[int, ClientRow]:
    """Returns the clients; of a crowd some stand-ins whose losses are spread alike, under numbers that mean nothing."""
    if len(clients) <= _CROWD:
        return clients
    ranked = sorted((client for client in clients.values() if math.isfinite(client.loss)), key=lambda c: c.loss)
    if not ranked:
        return {}
    picked = [ranked[round(at * (len(ranked) - 1) / (_SPREAD - 1))] for at in range(_SPREAD)]
    return dict(enumerate(picked))
