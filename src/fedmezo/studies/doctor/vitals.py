"""What the doctor looks at: a journal reduced to some numbers per client and round, read once, without any model."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fedmezo.errors import ConfigError, JournalError
from fedmezo.runtime.journal import Entry, Header, Journal, Round
from fedmezo.runtime.records import by_client
from fedmezo.studies.files import BEGUN, JOURNAL, SUMMARY, object_in
from fedmezo.zo.estimate import robust_scale

__all__ = ["Pulse", "Visit", "Vitals", "read", "writers_of"]


@dataclass(frozen=True, slots=True)
class Visit:
    """One client in one round.

    Attributes:
      client: its number.
      loss: mean loss along its walk, nats; nan when no step was finite.
      rate: its learning rate.
      weight: its weight in the mean.
      up: wire bytes of its reply.
      down: wire bytes of its task and of what brought it up to date.
      slopes: how many slopes it sent.
      skipped: how many of them were not finite.
      clipped: share of its slopes at the limit; nan when the server set none.
      scale: robust scale of its slopes; 0 for none.
      ceiling: how much its walk can have lowered its loss to first order, nats; see `_ceiling`.
    """

    client: int
    loss: float
    rate: float
    weight: float
    up: int
    down: int
    slopes: int
    skipped: int
    clipped: float
    scale: float
    ceiling: float


@dataclass(frozen=True, slots=True)
class Pulse:
    """One round: its figures from the journal, the robust scale of all its slopes, and who took part."""

    round: int
    loss: float
    rate: float
    slowed: float
    seconds: float
    forwards: int
    tokens: int
    digest: str | None
    scale: float
    mu: float
    visits: tuple[Visit, ...]


@dataclass(frozen=True)
class Vitals:
    """A run, reduced.

    Attributes:
      folder: the run's folder.
      header: the journal's header.
      config: the resolved configuration.
      pulses: one per complete round.
      evaluations: (round, split, metrics); round -1 is the untrained model.
      events: (round, kind, detail).
      summary: the run's summary; while it is in progress, what was written at its start.
      broken: why the journal could not be read further; empty if it could.
      method: "walk", or how backpropagation went; empty before the first round.
      steps: local steps of the newest round.
      busy: whether a process is writing the journal; None where that cannot be told.
      dim: trained scalars d; 0 when not known.
    """

    folder: Path
    header: Header
    config: Mapping[str, Any]
    pulses: tuple[Pulse, ...]
    evaluations: tuple[tuple[int, str, Mapping[str, float]], ...]
    events: tuple[tuple[int, str, str], ...]
    summary: Mapping[str, Any]
    broken: str = ""
    method: str = ""
    steps: int = 0
    busy: bool | None = None
    dim: int = 0

    def setting(self, path: str, default: Any = None) -> Any:
        """Returns a value of the configuration by its dotted key; `default` when it is not there or null."""
        value: Any = self.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    @property
    def walks(self) -> bool:
        """Whether the run descends by slopes."""
        return self.method == "walk"

    @property
    def start_rate(self) -> float:
        """0.3 / sqrt(d), where a rate of "auto" starts; nan when d is not known."""
        return 0.3 / math.sqrt(self.dim) if self.dim else math.nan

    @property
    def planned(self) -> int:
        """The rounds the run shall have, at least those it has; a budget lasts as long as it did so far."""
        done, wanted = len(self.pulses), int(self.setting("federation.rounds", 0))
        budget = [wanted] if wanted else []
        budget += [math.ceil(done / share) for share in self._spent() if share > 0]
        return max(done, min(budget, default=0))

    @cached_property
    def losses(self) -> tuple[tuple[int, float], ...]:
        """(round, mean training loss) of every round that has a finite one."""
        return tuple((pulse.round, pulse.loss) for pulse in self.pulses if math.isfinite(pulse.loss))

    @cached_property
    def clients(self) -> Mapping[int, tuple[tuple[int, Visit], ...]]:
        """Client -> (round, visit) of every round it took part in."""
        found: dict[int, list[tuple[int, Visit]]] = {}
        for pulse in self.pulses:
            for visit in pulse.visits:
                found.setdefault(visit.client, []).append((pulse.round, visit))
        return {client: tuple(visits) for client, visits in sorted(found.items())}

    @cached_property
    def judged(self) -> tuple[tuple[int, float], ...]:
        """(complete rounds, loss) of every evaluation on the common examples; 0 rounds is the untrained model."""
        return tuple(
            (number + 1, metrics["loss"])
            for number, split, metrics in self.evaluations
            if split == "eval" and math.isfinite(metrics.get("loss", math.nan))
        )

    @property
    def worse_than_untrained(self) -> bool:
        """Whether the last evaluation is 5 % worse than the first."""
        return len(self.judged) > 1 and self.judged[-1][1] > self.judged[0][1] + 0.05 * abs(self.judged[0][1])

    @property
    def finished(self) -> bool:
        """Whether the run has all its rounds, or has spent its budget."""
        wanted = int(self.setting("federation.rounds", 0))
        return 0 < wanted <= len(self.pulses) or any(share >= 1 for share in self._spent())

    def _spent(self) -> list[float]:
        """Returns the share of each budget that is spent."""
        moved = sum(visit.up + visit.down for pulse in self.pulses for visit in pulse.visits)
        sums = {name: sum(getattr(pulse, name) for pulse in self.pulses) for name in ("forwards", "tokens", "seconds")}
        spent = {"rounds": len(self.pulses), "bytes": moved, **sums}
        return [spent[name] / amount for name, amount in self.setting("federation.budget", {}).items() if name in spent]

    def recent(self, share: float = 0.25) -> tuple[Pulse, ...]:
        """Returns the last rounds: that share of them, at least five."""
        return self.pulses[-max(5, round(share * len(self.pulses))) :]


def read(folder: Path) -> Vitals:
    """Returns the vitals of a run, also of one in progress, one that died, or one whose journal is damaged further on.

    Raises:
      ConfigError: the folder holds no run.
      JournalError: the file is no journal, or its first record is damaged.
    """
    path = folder / JOURNAL
    if not path.is_file():
        raise ConfigError(f"{folder} holds no run (no {JOURNAL} in it); give the folder that `fedmezo run` made.")
    summary = object_in(folder / BEGUN) | object_in(folder / SUMMARY)
    with Journal.open(path, readonly=True) as journal:
        pulses, last, broken = _pulses(journal)
        task = last.entries[0].task if last is not None and last.entries else None
        config = json.loads(journal.header.config or "{}")
        return Vitals(
            folder=folder,
            header=journal.header,
            config=config if isinstance(config, dict) else {},
            pulses=pulses,
            evaluations=() if broken else tuple(sorted(journal.evaluations(), key=lambda item: item[0])),
            events=tuple(journal.events()),
            summary=summary,
            broken=broken,
            method=task.method if task is not None else "",
            steps=task.steps if task is not None else 0,
            busy=None if (pids := writers_of(path)) is None else bool(pids),
            dim=_dim(summary, last),
        )


def _dim(summary: Mapping[str, Any], last: Round | None) -> int:
    known = summary.get("dim")
    if isinstance(known, int) and known > 0:
        return known
    deltas = [entry.reply.delta for entry in last.entries if entry.reply.delta is not None] if last is not None else []
    return sum(tensor.numel() for tensor in deltas[0].tensors.values()) if deltas else 0


def writers_of(path: Path) -> tuple[int, ...] | None:
    """Returns the processes that hold a journal's lock file; None where that cannot be told.

    It only looks, so that no writer is ever turned away by it. A process in another container is number 0.
    """
    try:
        inode = path.with_name(path.name + ".lock").stat().st_ino
        held = Path("/proc/locks").read_text(encoding="ascii")
    except (OSError, UnicodeError):
        return None
    locks = [line.split() for line in held.splitlines()]
    return tuple(max(int(lock[4]), 0) for lock in locks if len(lock) > 5 and lock[5].endswith(f":{inode}"))


def _pulses(journal: Journal) -> tuple[tuple[Pulse, ...], Round | None, str]:
    pulses: list[Pulse] = []
    last: Round | None = None
    try:
        for last in journal.rounds():
            pulses.append(_pulse(last))
    except JournalError as error:
        return tuple(pulses), last, str(error)
    return tuple(pulses), last, ""


def _pulse(done: Round) -> Pulse:
    slopes = [slope for entry in by_client(done) for slope in entry.reply.slopes]
    return Pulse(
        round=done.round,
        loss=done.loss,
        rate=done.rate,
        slowed=done.slowed,
        seconds=done.seconds,
        forwards=done.forwards,
        tokens=done.tokens,
        digest=done.digest,
        scale=robust_scale(slopes),
        mu=fmean(entry.task.mu for entry in done.entries) if done.entries else math.nan,
        visits=tuple(map(_visit, by_client(done))),
    )


def _visit(entry: Entry) -> Visit:
    task, reply = entry.task, entry.reply
    sizes = np.abs(np.array(reply.slopes, dtype=np.float64))
    finite = sizes[np.isfinite(sizes)]
    limited = len(finite) > 0 and 0 < task.clip < math.inf
    return Visit(
        client=task.client,
        loss=reply.loss,
        rate=task.rate,
        weight=entry.weight,
        up=entry.bytes_up,
        down=entry.bytes_down,
        slopes=len(sizes),
        skipped=len(sizes) - len(finite),
        clipped=float(np.mean(finite >= task.clip)) if limited else math.nan,
        scale=robust_scale(reply.slopes),
        ceiling=_ceiling(entry, sizes),
    )


def _ceiling(entry: Entry, sizes: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Returns how much a walk can have lowered its loss to first order: the sum of |coefficient * slope|.

    A step along z by -rate * slope changes the loss by -rate * slope * (z . g), g the gradient. Its mean is
    -rate |g|^2, and E slope^2 >= |g|^2, noise of batches and rounding only adding to it. So the sum of rate * slope^2
    is an upper bound in the mean; nan where the slopes carry no size.
    """
    task = entry.task
    if not len(sizes) or task.coding == "sign" or len(sizes) % task.directions:
        return math.nan
    steps = np.nan_to_num(sizes).reshape(-1, task.directions)
    moved = np.minimum(steps, task.clip) if task.clip > 0 else steps
    if task.normalise:
        unit = np.sqrt(np.mean(moved**2, axis=1, keepdims=True))
        moved = np.divide(moved, unit, out=np.zeros_like(moved), where=unit > 0)
    return float(task.rate * np.sum(moved * steps) / task.directions / (1 - task.momentum))
