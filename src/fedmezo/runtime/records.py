"""What a journal records, as frozen values, and the rows they are stored in."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_args

from fedmezo.errors import JournalError, RunError, WireError
from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.spending import SPENT
from fedmezo.fl.walk import walk_of
from fedmezo.fl.whole import is_whole
from fedmezo.runtime.ledger import Row, Value, integer
from fedmezo.runtime.scalars import LARGEST
from fedmezo.runtime.wire import decode_reply, decode_task, encode_reply, encode_task
from fedmezo.zo.noise import Law
from fedmezo.zo.seedsum import DenseDelta, Update, Walk

__all__ = ["LOOK", "SLOW", "SUMMED", "Entry", "Header", "Round", "by_client", "header_of", "round_row", "update_of"]

LOOK = "look"  # the kind of event whose detail is a `pace.Look`, for the program only
SUMMED = "summed"  # the kind of event that says whose walks are in a sum, which is all that is known of each
SLOW = "slow"  # the kind of event whose detail is a factor on every later rate


@dataclass(frozen=True)
class Header:
    """What a run is, fixed when it starts.

    Attributes:
      config: the resolved configuration as JSON.
      fingerprint: sha256 of the base model's weights.
      layout: `Params.layout()` of what is trained.
      law: law of the directions.
      noise_version: version of the noise.
      package: version of fedmezo.
      created: UTC time, ISO 8601.
      kind: "simulation", or how else the clients ran.
    """

    config: str
    fingerprint: str
    layout: str
    law: str
    noise_version: int
    package: str
    created: str
    kind: str = "simulation"


@dataclass(frozen=True)
class Entry:
    """One client's share of a round: its task, its reply, the weight it got, and the wire bytes of both."""

    task: Task
    reply: Reply
    weight: float
    bytes_down: int
    bytes_up: int

    @property
    def walks(self) -> int:
        """How many clients walked for it: 1, those in a sum, or nobody where they have entries of their own."""
        return self.reply.examples if is_whole(self.task) else 1


@dataclass(frozen=True)
class Round:
    """One round, complete.

    Attributes:
      round: its number, from 0.
      entries: one per client, in client order.
      loss: mean training loss over the cohort, nats; nan when no client had a finite one.
      rate: mean learning rate over the cohort.
      slowed: factor on the rate that guards had set.
      seconds: wall clock, without evaluation.
      forwards: forward passes of the walks.
      tokens: tokens those passes read.
      digest: `Params.digest()` of the model after the round; None when it was not taken.
      evaluations: split -> metrics of the model after the round.
      events: (kind, detail) of guards and monitors.

    Raises:
      RunError: a task or reply is not of this round and client, a client is there twice, or odds differ.
    """

    round: int
    entries: tuple[Entry, ...]
    loss: float
    rate: float
    slowed: float
    seconds: float
    forwards: int
    tokens: int
    digest: str | None = None
    evaluations: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    events: tuple[tuple[str, str], ...] = ()

    @property
    def news(self) -> tuple[tuple[str, str], ...]:
        """The events that are for people."""
        return tuple((kind, detail) for kind, detail in self.events if kind not in (LOOK, SUMMED, SPENT))

    @property
    def epsilon(self) -> float | None:
        """The privacy that any unit has spent so far at most; None where none is kept."""
        told = [json.loads(detail)["epsilon"] for kind, detail in self.events if kind == SPENT]
        return (math.inf if told[-1] is None else float(told[-1])) if told else None

    def __post_init__(self) -> None:
        """Checks that tasks and replies belong together."""
        clients = [entry.task.client for entry in self.entries]
        for entry in self.entries:
            task, reply = entry.task, entry.reply
            if (task.round, reply.round, reply.client) != (self.round, self.round, task.client):
                raise RunError(f"Round {self.round}: the task or reply of client {task.client} is not of this round.")
        if sorted(set(clients)) != clients:
            raise RunError(f"Round {self.round}: entries must be in client order, one per client; got {clients}.")
        odds = self.entries[0].task.odds if self.entries else ()
        if not all(entry.task.odds is odds or entry.task.odds == odds for entry in self.entries):
            raise RunError(f"Round {self.round}: all tasks of a round must have the same odds.")


def header_of(row: Row, path: Path) -> Header:
    """Returns the header that a row holds; raises JournalError for any other row."""
    told: list[Any] = list(row)
    kinds = [int if field.name == "noise_version" else str for field in fields(Header)]
    if [type(value) for value in told] != kinds:
        raise JournalError(f"{path} is damaged: its header is no run's; restore a copy of it.")
    header = Header(*told)
    try:
        good = header.law in get_args(Law) and (not header.config or isinstance(json.loads(header.config), dict))
    except (ValueError, RecursionError):
        good = False
    if not good:
        raise JournalError(f"{path} is damaged: its header has no configuration or no law; restore a copy of it.")
    return header


def round_row(rows: Sequence[Row], number: int, *, path: Path) -> Row:
    """Returns the row of a round; raises JournalError when a damaged index has led to a record without it."""
    for row in rows:
        if row[0] == number:
            return row
    raise JournalError(f"{path} is damaged: round {number} is not where its index says; restore a copy of it.")


def by_client(done: Round) -> tuple[Entry, ...]:
    """Returns clients' entries; of a sum one for each client in it, of whom only its part of the bytes is known."""
    if not any(is_whole(entry.task) and entry.walks for entry in done.entries):
        return tuple(entry for entry in done.entries if not is_whole(entry.task))
    whole, told = done.entries[0], " ".join(detail for kind, detail in done.events if kind == SUMMED)
    clients = [int(number) for number in re.findall(r"\d+", told)]
    ups, downs = (_dealt(size, len(clients)) for size in (whole.bytes_up, whole.bytes_down))
    return tuple(
        Entry(
            replace(whole.task, client=client, rate=done.rate),
            Reply(done.round, client, 0, math.nan, ()),
            1 / len(clients),
            down,
            up,
        )
        for client, up, down in zip(clients, ups, downs, strict=True)
    )


def _dealt(amount: int, parts: int) -> list[int]:
    """Returns an amount in equal parts, as far as whole numbers go."""
    return [amount * (at + 1) // parts - amount * at // parts for at in range(parts)]


def update_of(done: Round) -> Update:
    """Returns what a round added to the model: its weighted walks, or deltas where backpropagation made them.

    Raises:
      RunError: a reply of backpropagation has no delta.
    """
    return Update(tuple(map(_part, done.entries)), tuple(entry.weight for entry in done.entries), done.round)


def _part(entry: Entry) -> Walk | DenseDelta:
    task, reply = entry.task, entry.reply
    if task.method == "walk":
        return walk_of(task, reply.slopes)
    if reply.delta is None:
        raise RunError(f"Round {task.round}: client {task.client} sent no parameters; a reply to {task.method} has to.")
    return reply.delta


def reply_rows(done: Round) -> list[Row]:
    """Returns the rows of table `replies` for a round; the task of the first row keeps the odds of all."""
    return [_row(entry, odds=not place) for place, entry in enumerate(done.entries)]


def _row(entry: Entry, *, odds: bool) -> Row:
    task, reply = entry.task, entry.reply
    # Slopes can rebuild a walk written out, so it is not kept. Backpropagation has no slopes, so its deltas are.
    kept = replace(reply, delta=None) if task.method == "walk" else reply
    short = task if odds else replace(task, odds=())
    numbers = (task.round, task.client, float(entry.weight), task.rate, float(reply.loss), reply.examples)
    return (*numbers, reply.skipped, entry.bytes_down, entry.bytes_up, encode_task(short), encode_reply(kept))


def entries_of(rows: Sequence[Row]) -> tuple[Entry, ...]:
    """Returns the entries of the round that `reply_rows` was given; all their tasks hold the same odds object.

    Raises:
      WireError: a task or a reply is not a valid message, or its weight no number.
      JournalError: a number of bytes is none.
    """
    entries = [_entry(row) for row in rows]
    odds = entries[0].task.odds if entries else ()
    return tuple(replace(e, task=replace(e.task, odds=odds)) if odds else e for e in entries)


def _entry(row: Row) -> Entry:
    weight, bytes_down, bytes_up, task, reply = row[2], *row[7:]
    if not (isinstance(task, bytes) and isinstance(reply, bytes)):
        raise WireError("Not a valid message: its column holds no bytes.")
    if not (isinstance(weight, int | float) and abs(weight) <= LARGEST):
        raise WireError(f"Not a valid reply: its weight is {weight!r}.")
    return Entry(decode_task(task)[0], decode_reply(reply), weight, integer(bytes_down), integer(bytes_up))


def metric_rows(round_number: int, split: str, metrics: Mapping[str, float]) -> list[Row]:
    """Returns the rows of table `evaluations`, one per metric.

    Raises:
      JournalError: there is no metric.
    """
    if not metrics:
        raise JournalError(f"The {split} evaluation of round {round_number} has no metric; leave it out.")
    return [(round_number, split, name, float(value)) for name, value in metrics.items()]


def event_row(round_number: int, kind: str, detail: str) -> Row:
    """Returns the row of table `events`.

    Raises:
      JournalError: the kind is "slow" and the detail is not a factor.
    """
    try:
        good = kind != SLOW or 0 < float(detail) < math.inf
    except ValueError:
        good = False
    if not good:
        raise JournalError(f"The detail of a 'slow' event is a factor above 0, got {detail!r}.")
    return (round_number, kind, detail)


def real(value: Value) -> float:
    """Returns a REAL column's value; NULL stands for nan."""
    return float(value) if isinstance(value, int | float) else math.nan
