"""The runs of a comparison: every one a process and a folder of its own, so that its memory is its own.

A folder that holds the finished run is read and not run again; one that holds an unfinished run is resumed.
"""

import json
import math
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedmezo.errors import ConfigError, JournalError
from fedmezo.runtime.journal import Journal
from fedmezo.studies.config import Config, load_config
from fedmezo.studies.files import JOURNAL, SUMMARY
from fedmezo.studies.folder import writing

__all__ = ["TUNING", "Job", "Launch", "Onlooker", "Outcome", "Process", "execute", "launch", "refuse_foreign", "so_far"]

TUNING = "tuning"
_PAUSE = 0.1  # seconds between two looks at the processes
_LOOK = 1.0  # seconds between two looks into the journals
_PATIENCE = 10.0  # seconds a process has to end when told to
_OUT_OF_MEMORY = 9


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      arm: label of the arm.
      column: "configured", "equal", "tuned" or "tuning".
      seed: its `federation.seed`.
      config: its whole configuration, as asked for.
      folder: the run's folder.
    """

    arm: str
    column: str
    seed: int
    config: Config = field(repr=False, hash=False)
    folder: Path

    @property
    def asked(self) -> Path:
        """The configuration as a file, beside the folder."""
        return self.folder.with_name(f"{self.folder.name}.toml")

    @property
    def log(self) -> Path:
        """What the process printed."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def finished(self) -> bool:
        """Whether the run is there, to its end."""
        return (self.folder / SUMMARY).exists() and (self.folder / JOURNAL).exists()


@dataclass(frozen=True)
class Outcome:
    """What became of one run: its summary, or why there is none that counts."""

    job: Job
    summary: Mapping[str, Any]
    error: str = ""

    @property
    def loss(self) -> float:
        """The final evaluation loss; nan when the run failed."""
        value = (self.summary.get("eval") or {}).get("end", {}).get("loss")
        return float(value) if value is not None and not self.error else math.nan


class Process(Protocol):
    """As much of a `subprocess.Popen` as is used."""

    def poll(self) -> int | None:
        """Returns the exit status, None while the process goes on."""

    def terminate(self) -> None:
        """Ends the process."""

    def kill(self) -> None:
        """Ends the process at once."""

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit status when there is one."""


Launch = Callable[[Job], Process]


class Onlooker:
    """Is told how the comparison goes; this one does nothing."""

    def planned(self, count: int) -> None:
        """Takes how many runs there will be, as far as known now."""

    def begun(self, job: Job) -> None:
        """Takes a run that starts."""

    def heard(self, job: Job, *, rounds: int, loss: float) -> None:
        """Takes how far a run is: complete rounds, newest evaluation loss (nan for none)."""

    def ended(self, outcome: Outcome) -> None:
        """Takes a run that ended, or was there already."""

    def note(self, text: str) -> None:
        """Takes a sentence."""


def launch(job: Job) -> Process:
    """Returns the process of a run that has just been started, or resumed if its journal is there."""
    verb = ["resume", str(job.folder)]
    if not (job.folder / JOURNAL).exists():
        verb = ["run", str(job.asked), "--out", str(job.folder)]
    command = [sys.executable, "-m", "fedmezo", *verb, "--json", "--quiet"]
    with job.log.open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)


def refuse_foreign(jobs: Iterable[Job]) -> None:
    """Makes sure that no job's folder holds a run of another configuration.

    Raises:
      ConfigError: one does; nothing is ever deleted here.
    """
    for job in jobs:
        if not (job.folder / JOURNAL).exists():
            continue
        with suppress(ConfigError):
            if job.asked.exists() and load_config(job.asked).digest() == job.config.digest():
                continue
        raise ConfigError(
            f"{job.folder} holds a run of another configuration than this comparison asks for; choose another --out, "
            "or remove that folder."
        )


def execute(jobs: Sequence[Job], *, at_once: int, launch: Launch, watch: Onlooker) -> list[Outcome]:
    """Returns what became of the jobs, in their order; a run that fails does not stop the others.

    Args:
      jobs: what to run.
      at_once: processes at the same time.
      launch: starts a job's process.
      watch: is told.

    Raises:
      ConfigError: a folder holds a run of another configuration, or cannot be written.
    """
    refuse_foreign(jobs)
    crew = _Crew(jobs, launch=launch, watch=watch)
    looked = time.monotonic()
    try:
        while crew.waiting or crew.active:
            crew.start_(at_once)
            crew.reap_()
            if crew.active:
                time.sleep(_PAUSE)
            if time.monotonic() - looked > _LOOK:
                looked = time.monotonic()
                crew.look()
    finally:
        _stop(process for _, process in crew.active.values())
    return [crew.found[job.folder] for job in jobs]


class _Crew:
    """The jobs of one batch: those that wait, those that run, and what became of the others; by folder."""

    def __init__(self, jobs: Sequence[Job], *, launch: Launch, watch: Onlooker) -> None:
        self.launch, self.watch = launch, watch
        self.waiting = deque(jobs)
        self.active: dict[Path, tuple[Job, Process]] = {}
        self.found: dict[Path, Outcome] = {}

    def start_(self, at_once: int) -> None:
        """Starts as many as may run; those that are finished already are only read."""
        while self.waiting and len(self.active) < at_once:
            job = self.waiting.popleft()
            if job.finished:
                self._end_(_outcome(job))
            else:
                self.watch.begun(job)
                self.active[job.folder] = (job, _start(job, self.launch))

    def reap_(self) -> None:
        """Takes the results of those that ended."""
        for job, process in list(self.active.values()):
            if (code := process.poll()) is not None:
                del self.active[job.folder]
                self._end_(_outcome(job, code=code))

    def look(self) -> None:
        """Tells how far the others are."""
        for job, _ in self.active.values():
            rounds, loss = so_far(job.folder)
            self.watch.heard(job, rounds=rounds, loss=loss)

    def _end_(self, outcome: Outcome) -> None:
        self.found[outcome.job.folder] = outcome
        self.watch.ended(outcome)


def _start(job: Job, launch: Launch) -> Process:
    with writing(job.folder.parent):
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        job.asked.write_text(job.config.to_toml(), encoding="utf-8")
        return launch(job)


def _stop(processes: Iterable[Process]) -> None:
    """Ends processes; the journal makes sure that none of their finished rounds is lost."""
    listed = list(processes)
    for process in listed:
        process.terminate()
    for process in listed:
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()


def _outcome(job: Job, *, code: int = 0) -> Outcome:
    if code:
        return Outcome(job, {}, _complaint(job, code))
    try:
        summary = json.loads((job.folder / SUMMARY).read_text(encoding="utf-8"))
        loss = summary["eval"]["end"].get("loss")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Outcome(job, {}, f"{job.folder / SUMMARY} cannot be read; remove the folder and run it again.")
    diverged = loss is None or not math.isfinite(loss)
    return Outcome(job, summary, "it diverged: the final evaluation loss is not a number" if diverged else "")


def _complaint(job: Job, code: int) -> str:
    """Returns why a process failed, from what it printed last."""
    if code < 0:
        more = "; perhaps out of memory" if -code == _OUT_OF_MEMORY else ""
        return f"it was ended by signal {-code}{more}"
    with suppress(OSError):
        lines = [line for line in job.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if told or lines:
            return " ".join(told) or lines[-1]
    return f"exit code {code}"


def so_far(folder: Path) -> tuple[int, float]:
    """Returns the complete rounds and the newest evaluation loss of a run that may still go on; 0 and nan at first."""
    with suppress(JournalError, OSError), Journal.open(folder / JOURNAL, readonly=True) as journal:
        losses = [metrics.get("loss", math.nan) for _, split, metrics in journal.evaluations() if split == "eval"]
        return journal.last, losses[-1] if losses else math.nan
    return 0, math.nan
