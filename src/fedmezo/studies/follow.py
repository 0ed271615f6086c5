"""The live view of a run that another process does: its rounds come from the journal, its notes from a file beside it.

That process keeps a `Teller`, this one calls `follow`, and the watcher is told what it would be told in there.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fedmezo.channels import plain
from fedmezo.errors import JournalError
from fedmezo.runtime.flower.children import Lines
from fedmezo.runtime.journal import Journal
from fedmezo.runtime.progress import RoundReport, report_of
from fedmezo.studies.files import JOURNAL
from fedmezo.studies.watch import NullWatch, Watch

__all__ = ["LIVE", "Teller", "follow"]

LIVE = "live.jsonl"
_NETWORK = "network"  # the kind of events that say who came and went; a teller tells them as notes
_STUBBORN = 20  # looks at a journal that cannot be opened before that is an error: it may just be made


class Teller(NullWatch):
    """A watcher that writes down what the journal does not hold: what a run is, and notes."""

    def __init__(self, folder: Path) -> None:
        """Begins a new file in a run's folder, which is made when needed."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / LIVE
        self._path.unlink(missing_ok=True)

    def start(self, info: Mapping[str, object]) -> None:
        """Writes what is known before the first round."""
        self._write({"start": plain(info)})

    def note(self, text: str) -> None:
        """Writes one sentence."""
        self._write({"note": text})

    def _write(self, said: Mapping[str, object]) -> None:
        # A full disk must not end a run for the sake of its live view.
        with suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")


def follow(
    folder: Path,
    watch: Watch,
    *,
    ended: Callable[[], bool],
    every: float = 0.5,
    skip: int = 0,
    rounds: int | None = None,
) -> None:
    """Tells `watch` of every round as the journal gets it, and of every note; returns when the run is over.

    Rounds that are taken back and done again are told again. `watch.finish` is the caller's.

    Args:
      folder: the run's folder; neither it nor its journal need be there yet.
      watch: told of what happens.
      ended: whether the run is over; asked before every look, so that the last rounds are told too.
      every: seconds between two looks.
      skip: rounds that are there already and not told.
      rounds: rounds the run will have, if not as configured.

    Raises:
      JournalError: the journal is damaged, or cannot be opened.
    """
    tale = _Tale(folder, watch, skip, rounds)
    try:
        while True:
            over = ended()
            tale.look()
            if over:
                return
            time.sleep(every)
    finally:
        tale.close()


class _Tale:
    """What has been told so far."""

    def __init__(self, folder: Path, watch: Watch, skip: int, rounds: int | None) -> None:
        self._folder, self._watch, self._next, self._rounds = folder, watch, skip, rounds
        self._skip, self._failed = skip, 0
        self._lines = Lines(folder / LIVE, told=False)
        self._journal: Journal | None = None
        self._back: frozenset[tuple[int, str]] = frozenset()
        self._seen = 0  # events of who came and went that were looked at
        self._began = self._taught = False

    def close(self) -> None:
        """Closes the journal."""
        if self._journal is not None:
            self._journal.close()

    def look(self) -> None:
        """Tells what is new."""
        for said in map(json.loads, self._lines.new()):
            self._taught = True
            if "start" in said:
                self._start(said["start"])
            if "note" in said:
                self._watch.note(str(said["note"]))
        journal = self._opened()
        if journal is not None:
            self._tell_events(journal)
            while (report := self._new_round(journal)) is not None:
                self._start(self._known(journal))
                self._watch.round(report)
                self._next = report.round + 1

    def _start(self, info: Mapping[str, object]) -> None:
        if not self._began:
            self._began = True
            found = info.get("rounds")
            self._rounds = found if self._rounds is None and isinstance(found, int) else self._rounds
            self._watch.start(info)

    def _tell_events(self, journal: Journal) -> None:
        """Tells who came and went, unless a teller does, at once: a round may be long in coming."""
        events = journal.events(_NETWORK)
        for _, _, detail in events[self._seen :] if not self._taught else ():
            self._watch.note(detail)
        self._seen = len(events)

    def _known(self, journal: Journal) -> dict[str, object]:
        """Returns what the journal tells of the run, for one that has no teller."""
        config = json.loads(journal.header.config)
        return {
            "run_dir": str(self._folder),
            "model": config["model"]["name"],
            "clients": config["federation"]["clients"],
            "rounds": self._rounds or config["federation"]["rounds"],
            "rate": config["algorithm"]["rate"],
            "mu": config["algorithm"]["mu"],
            "done": self._skip,
        }

    def _opened(self) -> Journal | None:
        if self._journal is None and (self._folder / JOURNAL).is_file():
            try:
                self._journal = Journal.open(self._folder / JOURNAL, readonly=True)
                self._back = _rollbacks(self._journal)
                self._next = min(self._next, self._journal.last)
                self._seen = len(self._journal.events(_NETWORK)) if self._skip else 0
            except JournalError:
                self._failed += 1
                if self._failed == _STUBBORN:
                    raise
        return self._journal

    def _new_round(self, journal: Journal) -> RoundReport | None:
        """Returns the next round that is there and not told, as it is now; None when there is none."""
        while True:
            back = _rollbacks(journal)
            # Every rollback is an event with a text of its own, and says how many rounds it kept.
            self._next = min([self._next, *(kept for kept, _ in back - self._back)])
            self._back = back
            if self._next >= journal.last:
                return None
            try:
                done = journal.round(self._next)
            except JournalError:
                if _rollbacks(journal) == back:
                    raise
                continue
            # A rollback between the two looks would make this a round after rounds that were not told.
            if _rollbacks(journal) == back:
                events = tuple(event for event in done.events if event[0] != _NETWORK)
                return report_of(replace(done, events=events), self._rounds or int(str(self._known(journal)["rounds"])))


def _rollbacks(journal: Journal) -> frozenset[tuple[int, str]]:
    return frozenset((kept, detail) for kept, _, detail in journal.events("rollback"))
