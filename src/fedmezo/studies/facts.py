"""What a journal says about a run, small enough to draw: one row per round, one per client, the evaluations."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from statistics import median
from typing import Any

from fedmezo.fl.spending import SPENT
from fedmezo.runtime.journal import Header, Journal, Round
from fedmezo.runtime.records import by_client
from fedmezo.zo.estimate import robust_scale

__all__ = [
    "OTHER",
    "ClientRow",
    "ClientTotal",
    "Facts",
    "Row",
    "Split",
    "gather",
    "privacy_in",
    "row_of",
    "setting",
]

Metrics = Mapping[str, float]
MOST_LABELS = 12  # as many colours as can be told apart
OTHER = "all others"


@dataclass(frozen=True, slots=True)
class ClientRow:
    """One client in one round: mean loss in nats, rate, wire bytes, skipped slopes, examples its walk used."""

    loss: float
    rate: float
    up: int
    down: int
    skipped: int
    examples: int


@dataclass(frozen=True, slots=True)
class ClientTotal:
    """One client over the run: rounds it took part in, its last loss and rate, and sums of the rest."""

    rounds: int
    loss: float
    rate: float
    up: int
    down: int
    skipped: int
    examples: int


@dataclass(frozen=True, slots=True)
class Row:
    """One round.

    Attributes:
      round: its number, from 0.
      loss: mean training loss, nats.
      rate: mean rate.
      rates: lowest and highest rate of the clients.
      scale: robust scale of the slopes (1.4826 times the median of |slope|).
      largest: largest |slope|.
      clip: limit on |slope| in force; nan for none, or when each walk limited itself.
      seconds: wall clock without evaluation.
      forwards: forward passes.
      tokens: tokens those passes read.
      digest: digest of the parameters after the round, if taken.
      events: (kind, detail).
      clients: what each client of the cohort did.
    """

    round: int
    loss: float
    rate: float
    rates: tuple[float, float]
    scale: float
    largest: float
    clip: float
    seconds: float
    forwards: int
    tokens: int
    digest: str | None
    events: tuple[tuple[str, str], ...]
    clients: Mapping[int, ClientRow]


@dataclass(frozen=True)
class Facts:
    """A run, reduced.

    Attributes:
      header: the journal's header.
      config: the resolved configuration.
      rows: one per round.
      evaluations: (round, split, metrics); round -1 is the untrained model.
      summary: the run's summary; empty while it is in progress.
      steps: local steps of the newest round; 0 before the first.
      mu: perturbation scale of the newest round; nan before the first.
      dense: whether weights travelled instead of scalars.
      privacy: what has been spent of whose privacy; empty where none is kept.
    """

    header: Header
    config: Mapping[str, object]
    rows: tuple[Row, ...]
    evaluations: tuple[tuple[int, str, Metrics], ...]
    summary: Mapping[str, object]
    steps: int
    mu: float
    dense: bool
    privacy: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def clients(self) -> tuple[int, ...]:
        """Every client that took part, in order."""
        return tuple(sorted({client for row in self.rows for client in row.clients}))

    @cached_property
    def splits(self) -> tuple[str, ...]:
        """The names of the evaluated splits, the one to judge the run by first."""
        names = dict.fromkeys(name for _, name, _ in self.evaluations)
        return tuple(sorted(names, key=lambda name: (name == "train", name not in ("test", "eval", "validation"))))

    @property
    def dim(self) -> int:
        """Number of trainable scalars; 0 when not known yet."""
        value = self.summary.get("dim", 0)
        return int(value) if isinstance(value, int | float) else 0

    def ends(self, split: str) -> tuple[Metrics, Metrics]:
        """Returns the first and the last metrics of one split; empty when there are none."""
        found = [metrics for _, name, metrics in self.evaluations if name == split]
        return (found[0], found[-1]) if found else ({}, {})

    def spent(self) -> dict[int, dict[str, float]]:
        """Returns what had been spent after each round, from -1 (nothing): rounds, forwards, seconds, bytes."""
        now = dict.fromkeys(("rounds", "forwards", "tokens", "seconds", "bytes", "up", "down", "dense"), 0.0)
        result = {-1: dict(now)}
        for row in self.rows:
            up = sum(client.up for client in row.clients.values())
            down = sum(client.down for client in row.clients.values())
            gain = (
                1,
                row.forwards,
                row.tokens,
                row.seconds,
                up + down,
                up,
                down,
                4 * self.dim * len(row.clients),
            )
            now = {name: before + more for (name, before), more in zip(now.items(), gain, strict=True)}
            result[row.round] = {**now, "rounds": float(row.round + 1)}
        return result

    def totals(self) -> dict[int, ClientTotal]:
        """Returns each client's sums; its loss and rate are the last finite ones."""
        result = dict.fromkeys(self.clients, ClientTotal(0, math.nan, math.nan, 0, 0, 0, 0))
        for row in self.rows:
            for client, new in row.clients.items():
                old = result[client]
                loss = new.loss if math.isfinite(new.loss) else old.loss
                sums = (
                    old.up + new.up,
                    old.down + new.down,
                    old.skipped + new.skipped,
                    old.examples + new.examples,
                )
                result[client] = ClientTotal(old.rounds + 1, loss, new.rate, *sums)
        return result


def gather(journal: Journal, *, summary: Mapping[str, object] | None = None) -> Facts:
    """Returns the facts of a run; reads the journal once, one round at a time.

    Args:
      journal: an open journal; a run in progress is fine.
      summary: the run's summary, if it has ended.
    """
    rows, last = [], None
    for last in journal.rounds():
        rows.append(row_of(last))
    task = last.entries[0].task if last and last.entries else None
    config = json.loads(journal.header.config or "{}")
    return Facts(
        header=journal.header,
        config=config if isinstance(config, dict) else {"config": config},
        rows=tuple(rows),
        evaluations=tuple(sorted(journal.evaluations(), key=lambda item: item[0])),
        summary=summary or {},
        steps=task.steps if task else 0,
        mu=task.mu if task else math.nan,
        dense=bool(task and task.dense),
        privacy=privacy_in(last) if last else {},
    )


def privacy_in(done: Round) -> Mapping[str, Any]:
    """Returns what had been spent of whose privacy after a round; empty where none is kept."""
    told = [detail for kind, detail in done.events if kind == SPENT]
    return dict(json.loads(told[-1])) if told else {}


def row_of(done: Round) -> Row:
    """Returns a round, reduced."""
    slopes = [abs(slope) for entry in by_client(done) for slope in entry.reply.slopes if math.isfinite(slope)]
    clips = [entry.task.clip for entry in by_client(done) if 0 < entry.task.clip < math.inf]
    rates = [entry.task.rate for entry in by_client(done)]
    return Row(
        round=done.round,
        loss=done.loss,
        rate=done.rate,
        rates=(min(rates, default=math.nan), max(rates, default=math.nan)),
        scale=robust_scale(slopes),
        largest=max(slopes, default=math.nan),
        clip=median(clips) if clips else math.nan,
        seconds=done.seconds,
        forwards=done.forwards,
        tokens=done.tokens,
        digest=done.digest,
        events=done.news,
        clients={
            entry.task.client: ClientRow(
                loss=entry.reply.loss,
                rate=entry.task.rate,
                up=entry.bytes_up,
                down=entry.bytes_down,
                skipped=entry.reply.skipped,
                examples=entry.reply.examples,
            )
            for entry in by_client(done)
        },
    )


def setting(facts: Facts, *keys: str) -> str:
    """Returns the first of the dotted keys that the configuration holds; empty when it holds none."""
    for key in keys:
        value: object = facts.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None and not isinstance(value, Mapping) and value != "":
            return str(value)
    return ""


class Split:
    """Who has what.

    Attributes:
      sizes: client -> number of training examples.
      distance: client -> distance of its label mix from the mix of all.
      names: the labels, most frequent first; at most twelve, the rare ones under one name.
      labels: client -> label -> examples.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        """Reads a split as a run hands it over: `sizes`, `histograms` and `distances`, by client; each optional.

        `labels` (client -> label -> count) and `distance` are taken as well.
        """
        self.sizes = dict(enumerate(given.get("sizes") or ()))
        self.distance = dict(enumerate(given.get("distances") or given.get("distance") or ()))
        labels = given.get("labels") or dict(enumerate(given.get("histograms") or ()))
        full = {int(client): dict(counts) for client, counts in labels.items()}
        sums: dict[str, float] = {}
        for counts in full.values():
            for name, amount in counts.items():
                sums[str(name)] = sums.get(str(name), 0) + amount
        ranked = sorted(sums, key=lambda name: (-sums[name], name))
        kept = ranked if len(ranked) <= MOST_LABELS else ranked[: MOST_LABELS - 1]
        self.names = [*kept, OTHER] if len(kept) < len(ranked) else kept
        self.labels = {client: self._fold(counts, set(kept)) for client, counts in full.items()}

    def _fold(self, counts: Mapping[str, float], kept: set[str]) -> dict[str, float]:
        folded = dict.fromkeys(self.names, 0.0)
        for name, amount in counts.items():
            folded[str(name) if str(name) in kept else OTHER] += amount
        return {name: int(amount) for name, amount in folded.items()}
