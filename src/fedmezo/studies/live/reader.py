"""Reads a journal on while it is written: a little at a time, read-only, and from the start when rounds went back."""

import json
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmezo.errors import JournalError
from fedmezo.runtime.flower.children import Lines
from fedmezo.runtime.journal import Journal
from fedmezo.studies.files import BEGUN, JOURNAL, SUMMARY, object_in
from fedmezo.studies.follow import LIVE
from fedmezo.studies.live.course import Course, Thinned
from fedmezo.studies.live.situation import Situation, Tempo, planned_of, situation_of

__all__ = ["Reader", "Seen"]

_MOST_NOTES = 40
_STUBBORN = 5  # looks at a journal that cannot be opened before that is told: it may just be made
_GONE = Situation("waiting")


@dataclass(frozen=True)
class Seen:
    """What one look found.

    Attributes:
      situation: how the run is.
      facts: the run; None before there is a journal.
      split: who has what, as `Split` takes it.
      notes: the newest sentences of a server, oldest first.
      behind: whether more rounds wait to be read at once.
    """

    situation: Situation
    facts: Thinned | None = None
    split: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    behind: bool = False


class Reader:
    """What is known of one folder's run. Each look opens the journal and closes it again, and never writes.

    The journal's own rules make a reader harmless: SQLite's write-ahead log lets one process write while others read,
    and a look reads one round per transaction, so nothing is held for longer than that.
    """

    def __init__(self, folder: Path, *, patience: float = 0.3) -> None:
        """Takes a run's folder, which need not be there yet, and the seconds that one look may read rounds for."""
        self._folder, self._patience = folder, patience
        self._journal = folder / JOURNAL
        self._lines, self._heard = Lines(folder / LIVE, told=False), (0, 0)
        self._notes: deque[str] = deque(maxlen=_MOST_NOTES)
        self._told: Mapping[str, Any] = {}
        self._shown: Course | None = None
        self._course: Course | None = None
        self._back: object = None
        self._behind = False
        self._written = self._failed = 0
        self._known: tuple[object, ...] = ()
        self._tempo = Tempo()

    def look(self) -> Seen:
        """Reads what is new, within the time a look may take."""
        self._hear()
        problem = ""
        if not self._journal.is_file():
            self._shown, self._course, self._known = None, None, ()
            return Seen(_GONE, notes=tuple(self._notes))
        stamp = self._stamp()
        try:
            # SQLite makes and removes files beside a journal that it opens; one that did not change is left alone.
            if stamp != self._known or self._behind:
                with Journal.open(self._journal, readonly=True) as journal:
                    self._read(journal)
                self._known = stamp
            self._failed = 0
        except JournalError as error:
            self._failed, self._known = self._failed + 1, ()
            self._shown = self._shown or self._course
            problem = str(error) if self._failed >= _STUBBORN else ""
        return self._seen(problem)

    def _stamp(self) -> tuple[object, ...]:
        """Returns what differs after the journal was written."""
        found: list[object] = []
        for path in (self._journal, self._journal.with_name(f"{JOURNAL}-wal")):
            with suppress(FileNotFoundError):
                told = path.stat()
                found += [path.name, told.st_ino, told.st_mtime_ns, told.st_size]
        return tuple(found)

    def _read(self, journal: Journal) -> None:
        back = journal.events("rollback")
        course = self._course
        if course is None or course.header != journal.header or back != self._back or journal.last < course.next:
            course = self._course = Course(journal.header)
            self._back = back
        if not course.begun and course.next < 2:
            start = {split: metrics for number, split, metrics in journal.evaluations() if number == -1}
            if start:
                course.judge(-1, start)
        until = time.monotonic() + self._patience
        while course.next < journal.last and time.monotonic() < until:
            course.add(journal.round(course.next))
        if journal.events("rollback") != back:
            self._course = None  # rounds of before and after a rollback may be mixed
        self._written = journal.last
        self._behind = self._course is None or course.next < self._written
        # Rounds that went back are shown again only when they have been read again.
        if not self._behind or self._shown is None or self._shown.header != course.header:
            self._shown = course

    def _seen(self, problem: str) -> Seen:
        course = self._shown
        if course is None:
            situation = Situation("unreadable", problem=problem) if problem else _GONE
            return Seen(situation, notes=tuple(self._notes), behind=False)
        begun, summary = object_in(self._folder / BEGUN), object_in(self._folder / SUMMARY)
        facts = course.facts({**begun, **summary})
        if not self._behind:  # rounds that were done long ago are read faster than they came
            self._tempo.see(facts.done, time.monotonic())
        seconds, _, rounds = facts.lately
        situation = situation_of(
            facts,
            folder=self._folder,
            written=self._written if self._behind else 0,
            planned=planned_of(facts, self._told),
            pace=self._tempo.pace(seconds, rounds),
        )
        if problem:
            situation = Situation("unreadable", facts.done, situation.planned, problem=problem)
        split = summary.get("split") or begun.get("split")
        split = split if isinstance(split, dict) else None
        return Seen(situation, facts, split, tuple(self._notes), self._behind and not problem)

    def _hear(self) -> None:
        """Takes what a server wrote for whoever looks on; a new file of a resumed run is read from its start."""
        path = self._folder / LIVE
        with suppress(OSError):
            found = path.stat()
            if self._heard[0] != found.st_ino or self._heard[1] > found.st_size:
                self._lines = Lines(path, told=False)
            self._heard = found.st_ino, found.st_size
        for line in self._lines.new():
            with suppress(ValueError, AttributeError):
                said = json.loads(line)
                self._told = said.get("start") or self._told
                self._notes.extend([str(said["note"])] if "note" in said else [])
