"""Keeps the newest view of a run for any number of browsers, and tells each what is new to it."""

import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmezo.errors import FedMeZOError

if TYPE_CHECKING:
    from fedmezo.studies.doctor import Finding
    from fedmezo.studies.live.reader import Reader, Seen
    from fedmezo.studies.live.view import View

# The journal brings torch, which takes seconds to load; the thread loads it, so that the address is known at once.

__all__ = ["Feed"]

# A look after a round costs some hundredths of a second, a diagnosis a second per 1,500 rounds; both rest this many
# times as long as they took, so that watching takes little from the run it watches.
_REST, _DOCTOR_REST = 10.0, 40.0
_OFTEN, _SELDOM, _DOCTOR = 1.0, 3.0, 5.0  # seconds from look to look of a run that goes on, and of one that does not
_FORGOTTEN = 20.0  # seconds after which nobody is thought to look on


class Feed:
    """A thread that looks at a run while anybody looks at the page.

    Laws: what a look costs does not depend on how many browsers ask; without any it does not look at all.
    """

    def __init__(self, folder: Path) -> None:
        """Takes a run's folder, which need not be there yet."""
        self._folder = folder
        self._reader: Reader | None = None
        self._id = secrets.token_hex(4)
        self._version = 0
        self._view: View | None = None
        self._parts: dict[str, tuple[int, str]] = {}  # name -> version it came with, text
        self._figures: dict[str, tuple[int, str]] = {}
        self._findings: Sequence[Finding] = ()
        self._patient: tuple[str, int, str] = ("", 0, "")  # whom the doctor saw last: which run, rounds, state
        self._due = 0.0
        self._again = _OFTEN
        self._asked = 0.0
        self._lock, self._wake, self._over = threading.Lock(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._follow, name="fedmezo live page", daemon=True)

    def start(self) -> None:
        """Begins to look."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; a second call does nothing."""
        self._over.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def answer(self, cursor: str) -> bytes:
        """Returns what is new since `cursor`, as JSON; everything for an unknown cursor.

        Args:
          cursor: that of the answer before; empty for none.
        """
        self._asked = time.monotonic()
        self._wake.set()
        name, _, text = cursor.partition("-")
        since = int(text) if name == self._id and text.isascii() and text.isdigit() and len(text) < 16 else 0
        with self._lock:
            view, again = self._view, self._again
            parts = {name: text for name, (at, text) in self._parts.items() if at > since}
            figures = [text for at, text in self._figures.values() if at > since]
            told: dict[str, Any] = {"cursor": f"{self._id}-{self._version}", "again": round(again, 1), "parts": parts}
        if view is not None:
            from fedmezo.studies.live.situation import quiet_for

            age = quiet_for(self._folder)
            told |= {"state": view.state, "words": view.words, "title": view.title, "share": view.share}
            told["age"] = None if age is None else round(age, 1)
        # The figures are JSON already.
        return f'{json.dumps(told)[:-1]}, "figures": [{", ".join(figures)}]}}'.encode()

    def look(self) -> bool:
        """Looks once; returns whether there is more to read at once."""
        from fedmezo.studies.live.reader import Reader
        from fedmezo.studies.live.view import View, view_of

        self._reader = self._reader or Reader(self._folder)
        try:
            seen = self._reader.look()
            self._ask_the_doctor(seen)
            view = view_of(seen, folder=self._folder, findings=self._findings)
        # A journal may hold anything, and a page that stands still without a word would be worse than this sentence.
        except Exception as error:
            before = self._view or View("", "", "fedmezo", None, {}, {})
            told = " ".join(f"{type(error).__name__}: {error}".split())
            self._view = replace(before, state="unreadable", words=f"The run cannot be shown ({told}).")
            return False
        self._publish(view)
        self._again = _OFTEN if view.state in ("running", "reading", "finishing") else _SELDOM
        return seen.behind

    def _publish(self, view: "View") -> None:
        with self._lock:
            version = self._version + 1
            parts, figures = _renewed(self._parts, view.parts, version), _renewed(self._figures, view.figures, version)
            if (parts, figures) != (self._parts, self._figures):
                self._version = version
            self._view, self._parts, self._figures = view, parts, figures

    def _ask_the_doctor(self, seen: "Seen") -> None:
        from fedmezo.studies.doctor import diagnose

        facts, state = seen.facts, seen.situation.state
        if facts is None or not facts.done or state in ("waiting", "reading"):
            self._findings = () if facts is None else self._findings
            return
        patient = (facts.header.created, facts.done, state)
        if patient != self._patient and (state != self._patient[2] or time.monotonic() >= self._due):
            began = time.monotonic()
            with suppress(FedMeZOError, OSError):  # the reader tells what is wrong with the journal
                self._findings = diagnose(self._folder).findings
            ended = time.monotonic()
            self._patient, self._due = patient, ended + max(_DOCTOR, _DOCTOR_REST * (ended - began))

    def _follow(self) -> None:
        while not self._over.is_set():
            self._wake.clear()
            if time.monotonic() - self._asked > _FORGOTTEN and self._view is not None:
                self._wake.wait()
                continue
            began = time.monotonic()
            more = self.look()
            took = time.monotonic() - began
            # Catching up needs no rest; what it costs is over soon.
            self._over.wait(0.0 if more else max(self._again, _REST * took))


def _renewed(old: Mapping[str, tuple[int, str]], texts: Mapping[str, str], version: int) -> dict[str, tuple[int, str]]:
    """Returns the texts, each with the version it came with."""
    return {
        name: old[name] if name in old and old[name][1] == text else (version, text) for name, text in texts.items()
    }
