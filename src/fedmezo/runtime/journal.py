"""The journal: a whole run in one SQLite file, from which the model is rebuilt bit for bit.

    with Journal.open(Path("runs/demo/journal.sqlite"), readonly=True) as journal:
        replay(params, journal, upto=10)

A round is one transaction, on the disk before `append` returns: a process killed at any instant leaves whole rounds
only. Directions are not stored, only slopes, so a round of 3 clients with 30 steps takes about 1.5 kB; the odds of a
pool, 2 bytes per seed, are stored once per round. What backpropagation trained is stored whole. The records form a hash
chain (see `ledger.py`), and a record is checked against it whenever it is read.

People may query the file: tables run, rounds, replies, evaluations and events have plain columns; nan is NULL.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any, Self

from fedmezo.errors import JournalError, RunError, WireError
from fedmezo.runtime.ledger import Ledger, integer
from fedmezo.runtime.records import (
    LOOK,
    SLOW,
    Entry,
    Header,
    Round,
    entries_of,
    event_row,
    header_of,
    metric_rows,
    real,
    reply_rows,
    round_row,
    update_of,
)
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import apply_

__all__ = ["LOOK", "SLOW", "Entry", "Header", "Journal", "Round", "replay", "update_of"]

_Evaluations = dict[tuple[int, str], dict[str, float]]


class Journal:
    """An open journal; one process writes, any number read. A context manager that closes itself."""

    def __init__(self, ledger: Ledger) -> None:
        """Reads the header; use `create` or `open`."""
        self._ledger = ledger
        self._slowed = 0, 1.0  # the next record to look at, and the product of the "slow" events before it
        rows = ledger.record(0)["run"]
        self.header = header_of(rows[0] if rows else (), ledger.path)

    @classmethod
    def create(cls, path: Path, header: Header) -> Self:
        """Returns a new, empty journal, open for writing.

        Raises:
          JournalError: there is one already, or the folder cannot be written.
        """
        return cls(Ledger.create(Path(path), {"run": [astuple(header)]}))

    @classmethod
    def open(cls, path: Path, *, readonly: bool = False) -> Self:
        """Returns an existing journal.

        Args:
          path: the file.
          readonly: change nothing in it; works while another process writes it.

        Raises:
          JournalError: it is not there, not a journal, damaged, newer than this package, being written, not writable.
        """
        ledger = Ledger.open(Path(path), readonly=readonly)
        try:
            return cls(ledger)
        except BaseException:
            ledger.close()
            raise

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the file."""
        self.close()

    def close(self) -> None:
        """Closes the file and lets other processes write it."""
        self._ledger.close()

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self._ledger.path

    @property
    def last(self) -> int:
        """The number of complete rounds, so also the number of the next round."""
        return integer(self._ledger.query("SELECT COALESCE(MAX(round) + 1, 0) FROM rounds")[0][0])

    def append(self, done: Round) -> None:
        """Writes one round; when it returns, the round is on the disk.

        Raises:
          JournalError: it is not the next round, or the disk is full or fails; the rounds before it are safe.
        """
        if done.round != self.last:
            raise JournalError(f"{self.path}: the next round is {self.last}, got round {done.round}; append in order.")
        numbers = (done.loss, done.rate, done.slowed, done.seconds)
        self._ledger.add(
            done.round,
            {
                "rounds": [(done.round, *map(float, numbers), done.forwards, done.tokens, done.digest)],
                "replies": reply_rows(done),
                "evaluations": [row for item in done.evaluations.items() for row in metric_rows(done.round, *item)],
                "events": [event_row(done.round, kind, detail) for kind, detail in done.events],
            },
        )

    def round(self, number: int) -> Round:
        """Returns one round, with all evaluations and events recorded for it; dense walks come as their slopes.

        Raises:
          JournalError: there is no such round, or it is damaged.
        """
        with self._ledger.reading():
            found = self._ledger.query("SELECT link FROM rounds WHERE round = ?", number)
            if not found:
                raise JournalError(f"{self.path} has no round {number}; it has rounds 0 to {self.last - 1}.")
            rows = self._ledger.record(integer(found[0][0]))
            evaluations = {split: metrics for (_, split), metrics in self._evaluations(number).items()}
            events = self._ledger.query("SELECT kind, detail FROM events WHERE round = ? ORDER BY link, place", number)
        numbers = round_row(rows["rounds"], number, path=self.path)
        try:
            return Round(
                number,
                entries_of(rows["replies"]),
                loss=real(numbers[1]),
                rate=real(numbers[2]),
                slowed=real(numbers[3]),
                seconds=real(numbers[4]),
                forwards=integer(numbers[5]),
                tokens=integer(numbers[6]),
                digest=None if numbers[7] is None else str(numbers[7]),
                evaluations=evaluations,
                events=tuple((str(kind), str(detail)) for kind, detail in events),
            )
        except (WireError, RunError) as error:
            by = f"written by fedmezo {self.header.package}"
            raise JournalError(f"{self.path}, {by}: round {number} cannot be read ({error}).") from error

    def rounds(self) -> Iterator[Round]:
        """Yields the complete rounds in order, each checked against the chain."""
        for number in range(self.last):
            yield self.round(number)

    def record_evaluation(self, round_number: int, split: str, metrics: Mapping[str, float]) -> None:
        """Writes an evaluation of the model after a round; the untrained model's round is -1.

        Raises:
          JournalError: it is there already, there is no such round, or the disk is full or fails.
        """
        self.record_evaluations(round_number, {split: metrics})

    def record_evaluations(self, round_number: int, evaluations: Mapping[str, Mapping[str, float]]) -> None:
        """Writes the evaluations of several splits, all or none of them; raises as `record_evaluation`."""
        there = {split for _, split in self._evaluations(round_number)}
        for split in evaluations:
            if split in there or not -1 <= round_number < self.last:
                raise JournalError(
                    f"{self.path}: round {round_number} has a {split} evaluation already, or is not complete yet."
                )
        rows = [row for item in evaluations.items() for row in metric_rows(round_number, *item)]
        if rows:
            self._ledger.add(round_number, {"evaluations": rows})

    def evaluations(self) -> list[tuple[int, str, dict[str, float]]]:
        """Returns (round, split, metrics) by round; round -1 is the untrained model."""
        return [(number, split, metrics) for (number, split), metrics in self._evaluations().items()]

    def _evaluations(self, number: int | None = None) -> _Evaluations:
        found: _Evaluations = {}
        sql = "SELECT round, split, metric, value FROM evaluations {} ORDER BY round, link, place"
        where, given = ("", ()) if number is None else ("WHERE round = ?", (number,))
        for at, split, metric, value in self._ledger.query(sql.format(where), *given):
            found.setdefault((integer(at), str(split)), {})[str(metric)] = real(value)
        return found

    def add_event(self, round_number: int, kind: str, detail: str) -> None:
        """Writes an event that belongs to no append; `round_number` is the round it comes before, usually `last`.

        Raises:
          JournalError: kind is "slow" and detail is no factor, or the disk is full or fails.
        """
        self._ledger.add(round_number, {"events": [event_row(round_number, kind, detail)]})

    def events(self, kind: str | None = None) -> list[tuple[int, str, str]]:
        """Returns (round, kind, detail) of all events, or of one kind, in the order they were written."""
        sql = "SELECT round, kind, detail FROM events {} ORDER BY link, place"
        where, given = ("", ()) if kind is None else ("WHERE kind = ?", (kind,))
        return [(integer(at), str(name), str(text)) for at, name, text in self._ledger.query(sql.format(where), *given)]

    def slowed(self) -> float:
        """Returns the factor that guards have put on every later rate: the product of all "slow" events."""
        link, factor = self._slowed if self._ledger.writable else (0, 1.0)
        # Every round asks, and a client that fails always leaves an event a round: what was read is not read again.
        sql = "SELECT detail FROM events WHERE link >= ? AND kind = ? ORDER BY link, place"
        rows = self._ledger.query(sql, link, SLOW)
        try:
            self._slowed = self._ledger.length(), math.prod([factor, *(float(str(detail)) for (detail,) in rows)])
            return self._slowed[1]
        except ValueError as error:
            raise JournalError(f"{self.path}: an event says by which factor rates were slowed ({error}).") from error

    def _slowed_before(self, link: int) -> float:
        sql = "SELECT detail FROM events WHERE link < ? AND kind = ? ORDER BY link, place"
        return math.prod(float(str(detail)) for (detail,) in self._ledger.query(sql, link, SLOW))

    def rollback(self, round_number: int, reason: str, *, slowed: float | None = None, look: str | None = None) -> Path:
        """Keeps rounds 0 .. round_number - 1, so `round_number` complete rounds, and returns a copy of all there was.

        Whatever was written from round `round_number` on goes, slow events too: the journal is as it was just before
        that round, plus one event "rollback". 0 leaves the untrained model.

        Args:
          round_number: how many rounds to keep.
          reason: why, for people.
          slowed: what `slowed()` shall be from here on; None for what it was at that round.
          look: detail of an event "look" that comes with it. All is one transaction: a guard that was killed halfway
            would go on at another rate than one that was not.

        Raises:
          JournalError: there are fewer rounds, or the copy cannot be written; nothing has changed then.
        """
        last = self.last
        if not 0 <= round_number <= last:
            raise JournalError(f"{self.path}: cannot keep {round_number} rounds, it has {last}; give 0 to {last}.")
        backup = self._ledger.backup("before-rollback")
        found = self._ledger.query("SELECT link FROM rounds WHERE round = ?", round_number)
        link = integer(found[0][0]) if found else self._ledger.length()
        detail = f"{reason}: kept {round_number} of {last} rounds, all of them are in {backup.name}"
        self._slowed = 0, 1.0
        events = [event_row(round_number, "rollback", detail)]
        if slowed is not None:
            events.append(event_row(round_number, SLOW, repr(slowed / self._slowed_before(link))))
        if look is not None:
            events.append(event_row(round_number, LOOK, look))
        self._ledger.cut(link, round_number, {"events": events})
        return backup

    def settle(self) -> bool:
        """Moves all that was written into the one file; returns whether it is there, or a reader is in the way."""
        return self._ledger.settle()

    def check_head(self) -> None:
        """Checks that no record is missing at the end, where the newest ones are.

        Raises:
          JournalError: some are.
        """
        self._ledger.check_head()

    def verify_chain(self) -> None:
        """Checks every record against the hash chain, and the file's structure.

        Raises:
          JournalError: naming the first round that is damaged.
        """
        self._ledger.verify()


def replay(params: Params, journal: Journal, *, upto: int | None = None) -> None:
    """Adds the journal's rounds to `params` in place; from the untrained parameters this gives the run's bits.

    Args:
      params: what the run trained, as it was before round 0.
      journal: the run.
      upto: how many rounds; None for all.

    Raises:
      JournalError: the journal is of other parameters, has fewer rounds, or is damaged.
    """
    if params.layout() != journal.header.layout:
        raise JournalError(
            f"{journal.path} belongs to other parameters: layout {journal.header.layout[:12]}, these have "
            f"{params.layout()[:12]}; use the model and the adapter settings the run began with."
        )
    last = journal.last
    if upto is not None and not 0 <= upto <= last:
        raise JournalError(f"{journal.path} has {last} rounds, cannot replay {upto}; give 0 to {last}.")
    law: Any = journal.header.law
    for number in range(last if upto is None else upto):
        done = journal.round(number)
        try:
            apply_(params, update_of(done), law=law)
        except (RunError, ValueError, KeyError) as error:
            raise JournalError(f"{journal.path}: round {number} cannot be replayed ({error}).") from error
