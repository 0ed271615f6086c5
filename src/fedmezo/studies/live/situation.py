"""How a run is now: whether anybody writes its journal, in how much memory, how many rounds are left and how long."""

import math
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedmezo.studies.doctor.vitals import writers_of
from fedmezo.studies.files import JOURNAL
from fedmezo.studies.live.course import Thinned

__all__ = ["Memory", "Situation", "State", "Tempo", "planned_of", "quiet_for", "situation_of"]

State = Literal["waiting", "reading", "running", "finishing", "ended", "stopped", "unreadable"]
_PROCESSES = Path("/proc")
_FRESH = 60.0  # seconds a run without news still counts as running, where nobody can tell who writes


@dataclass(frozen=True)
class Memory:
    """Memory of the process that writes the journal, and of those it started; bytes.

    Attributes:
      now: resident now.
      peak: the most that was ever resident.
      others: resident now in the processes it started; pages they share count in each.
      helpers: how many these are.
    """

    now: float
    peak: float
    others: float = 0.0
    helpers: int = 0


@dataclass(frozen=True)
class Situation:
    """How a run is now.

    Attributes:
      state: "waiting" for a journal, "reading" one that has long been written, "running", "finishing" after the last
        round, "ended", "stopped" before it, or "unreadable".
      done: complete rounds.
      planned: the rounds it shall have; 0 when not known.
      written: the rounds in the journal, while it is being read; else 0.
      pace: seconds a round, from one to the next; nan when not known.
      memory: of the process that writes; None when not known.
      problem: why it is unreadable.
    """

    state: State
    done: int = 0
    planned: int = 0
    written: int = 0
    pace: float = math.nan
    memory: Memory | None = None
    problem: str = ""

    @property
    def left(self) -> float:
        """Seconds until the last round, about; nan when not known."""
        missing = self.planned - self.done
        return missing * self.pace if self.state in ("running", "reading") and missing > 0 else math.nan


class Tempo:
    """How fast rounds come, by this machine's clock: evaluations and pauses count too."""

    def __init__(self) -> None:
        """Begins without any."""
        self._seen: deque[tuple[float, int]] = deque(maxlen=30)

    def see(self, done: int, now: float) -> None:
        """Takes how many rounds are done at a time."""
        if self._seen and done < self._seen[-1][1]:
            self._seen.clear()
        if not self._seen or done > self._seen[-1][1]:
            self._seen.append((now, done))

    def pace(self, seconds: float, rounds: int) -> float:
        """Returns the seconds from round to round; by the journal's own seconds as long as few were seen to come."""
        (first, start), (last, end) = (self._seen[0], self._seen[-1]) if self._seen else ((0.0, 0), (0.0, 0))
        # The first sight may be long after a round, so that two more are wanted.
        if len(self._seen) > 3 and end > start:
            return (last - first) / (end - start)
        return seconds / rounds if rounds else math.nan


def planned_of(facts: Thinned, told: Mapping[str, Any]) -> int:
    """Returns the rounds a run shall have, as its configuration says; a budget lasts as long as it did so far.

    Args:
      facts: the run.
      told: what a server wrote of the run at its start; its number of rounds comes first.
    """
    federation: Any = facts.config.get("federation") or {}
    wanted = told.get("rounds") or federation.get("rounds")
    known = [wanted] if isinstance(wanted, int) and wanted > 0 else []
    spent = facts.spent().get(facts.done - 1, {})
    for name, amount in (federation.get("budget") or {}).items():
        share = spent.get(name, 0.0) / amount
        known += [math.ceil(facts.done / share)] if share > 0 else []
    return min(known, default=0)


def quiet_for(folder: Path) -> float | None:
    """Returns the seconds since a run's journal was written; None when there is none."""
    found = []
    for name in (JOURNAL, f"{JOURNAL}-wal"):
        with suppress(OSError):
            found.append((folder / name).stat().st_mtime)
    return max(time.time() - max(found), 0.0) if found else None


def situation_of(facts: Thinned, *, folder: Path, written: int, planned: int, pace: float) -> Situation:
    """Returns how a run is now.

    Args:
      facts: the run as far as it was read.
      folder: the run's folder.
      written: the rounds in the journal, when not all of them were read; else 0.
      planned: as `planned_of`.
      pace: seconds a round.
    """
    writers = writers_of(folder / JOURNAL)
    patience = max(_FRESH, 5 * pace) if math.isfinite(pace) else _FRESH
    busy = bool(writers) if writers is not None else (quiet_for(folder) or 0.0) < patience
    whole = facts.done >= planned > 0
    ended = whole or facts.summary.get("rounds") == facts.done > 0
    state: State = "stopped"
    if written:
        state = "reading"
    elif busy:
        # A run that goes on beyond its configured rounds writes on.
        state = "finishing" if whole and facts.done == planned else "running"
    elif ended:
        state = "ended"
    planned = planned if planned >= facts.done else 0
    return Situation(state, facts.done, planned, written, pace, _memory(writers or ()))


def _memory(writers: tuple[int, ...]) -> Memory | None:
    """Returns the memory of the writers; None where the system does not tell."""
    for number in filter(None, writers):
        told = _status(number)
        if told:
            helpers = [status[0] for child in _below(number) if (status := _status(child))]
            return Memory(told[0], told[1], float(sum(helpers)), len(helpers))
    return None


def _status(number: int) -> tuple[float, float] | None:
    """Returns what a process has resident, and the most it had; None when it is gone."""
    with suppress(OSError, ValueError, KeyError, IndexError):
        lines = (_PROCESSES / str(number) / "status").read_text(encoding="utf-8").splitlines()
        told = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        return 1024.0 * int(told["VmRSS"][0]), 1024.0 * int(told["VmHWM"][0])
    return None


def _below(number: int) -> list[int]:
    """Returns the processes that a process started, and those they started."""
    with suppress(OSError, ValueError):
        tasks = list((_PROCESSES / str(number) / "task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
        return [*children, *(grandchild for child in children for grandchild in _below(child))]
    return []
