"""The server's side of a run over Flower: its SuperLink, the clients' keys, the run, and the live view of it."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedmezo.errors import ConfigError, RunError
from fedmezo.runtime.flower.children import Child, listens, settle
from fedmezo.runtime.flower.control import Control, RunState, wait_until_ready
from fedmezo.runtime.flower.folder import write_app
from fedmezo.runtime.flower.programs import Address, Tls, superlink
from fedmezo.studies.appconfig import app_config
from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.files import JOURNAL, SUMMARY
from fedmezo.studies.watch import Watch

__all__ = ["Hosting", "database_of", "home_of", "host", "known_config"]

_SELDOM = 30.0  # seconds between two questions to Flower when nothing hints at an end; each costs a second of CPU


@dataclass(frozen=True)
class Hosting:
    """What a server does.

    Attributes:
      address: where the SuperLink listens.
      folder: the run's folder.
      tls: the server's certificate; None for open connections.
      keys: the clients' public keys.
      config: the run; None for a SuperLink only, to which runs are submitted.
      resume: go on with the run in the folder.
      more: rounds in all when going on; 0 for as many as configured.
    """

    address: Address
    folder: Path
    tls: Tls | None = None
    keys: tuple[Path, ...] = field(default=())
    config: Config | None = None
    resume: bool = False
    more: int = 0


def home_of(folder: Path) -> Path:
    """Returns where Flower keeps its things for a run's folder."""
    return folder / "flower"


def database_of(folder: Path) -> Path:
    """Returns the file in which Flower keeps its state for a run's folder."""
    return home_of(folder) / "superlink.db"


# The journal brings torch, which a server without a run has no use for; so it is imported where it is read.


def known_config(folder: Path) -> Config:
    """Returns the configuration of the run in a folder.

    Raises:
      ConfigError: there is none.
    """
    from fedmezo.runtime.journal import Journal

    path = folder / JOURNAL
    if not path.exists():
        raise ConfigError(f"--resume: {folder} holds no run (no {JOURNAL} in it); give the folder of one.")
    with Journal.open(path, readonly=True) as journal:
        return parse_config(json.loads(journal.header.config))


def host(asked: Hosting, *, watch: Watch, ready: Callable[[], None] = lambda: None) -> Mapping[str, Any] | None:
    """Serves until the run is over, or for ever when there is none, and returns the summary of the run.

    Whatever ends it, the programs it started are ended too.

    Args:
      asked: what to do.
      watch: told of every round.
      ready: called when clients can join, before the run is submitted.

    Raises:
      ConfigError: the folder holds a run already, or the port is taken.
      RunError: Flower cannot be started, or the run failed; the server app's own sentence.
    """
    _refuse(asked)
    home = home_of(asked.folder)
    control = Control(asked.address.from_here, home=home, tls=asked.tls)
    command = superlink(asked.address, database=database_of(asked.folder), tls=asked.tls)
    child = Child("Flower's SuperLink", command, env=control.env, log=home / "superlink.log")
    try:
        wait_until_ready(child, asked.address, tls=asked.tls)
        control.register(asked.keys)
        ready()
        if asked.config is not None:
            with _told_how_to_go_on(asked.folder):
                return _run(asked, asked.config, control=control, child=child, watch=watch)
        while child.code is None:
            time.sleep(0.5)
        raise _fallen(child)
    finally:
        child.close()


@contextmanager
def _told_how_to_go_on(folder: Path) -> Iterator[None]:
    """Lends a scope whose errors say how to go on, where there is a run to go on with."""
    try:
        yield
    except RunError as error:
        if not (folder / JOURNAL).exists() or "--resume" in str(error):
            raise
        raise RunError(f"{error} Go on with: fedmezo server --resume {folder}") from error


def _refuse(asked: Hosting) -> None:
    if asked.config is not None and not asked.resume and (asked.folder / JOURNAL).exists():
        raise ConfigError(
            f"{asked.folder} holds a run already; go on with `fedmezo server --resume {asked.folder}` or choose "
            "another --out."
        )
    if others := settle(home_of(asked.folder)):
        raise ConfigError(
            f"Another server of {asked.folder} is still running (process {others[0]}); stop it first: kill "
            f"{' '.join(map(str, others))}"
        )
    if listens(asked.address):
        raise ConfigError(f"Another program listens on {asked.address} already; stop it, or give another --port.")


def _run(asked: Hosting, config: Config, *, control: Control, child: Child, watch: Watch) -> Mapping[str, Any]:
    from fedmezo.studies.folder import write_whole
    from fedmezo.studies.follow import LIVE, follow
    from fedmezo.studies.seal import renew

    folder, home = asked.folder.absolute(), home_of(asked.folder)
    write_app(home / "app", app_config(config, folder=str(folder), resume=asked.resume, more=asked.more))
    (folder / LIVE).unlink(missing_ok=True)
    skip = _rounds(folder) if asked.resume else 0
    course = _Course(control, child, control.submit(home / "app"))
    follow(folder, watch, ended=course.ended, skip=skip, rounds=asked.more or None)
    if not course.state.good:
        (home / "run.log").write_text(control.log(course.run), encoding="utf-8")
        raise RunError(f"{course.state.reason} (all that the server app wrote: {home / 'run.log'}).")
    path = folder / SUMMARY
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary["flower"] = {"up": course.state.up, "down": course.state.down}
    write_whole(path, json.dumps(summary, indent=2) + "\n")
    renew(folder, path.name)
    return dict(summary)


def _rounds(folder: Path) -> int:
    from fedmezo.runtime.journal import Journal

    with Journal.open(folder / JOURNAL, readonly=True) as journal:
        return journal.last


class _Course:
    """How a submitted run is, asked as seldom as will do."""

    def __init__(self, control: Control, child: Child, run: str) -> None:
        self.control, self.run, self.state = control, run, RunState("pending", "")
        self._child, self._hinted, self._asked = child, False, time.monotonic()

    def ended(self) -> bool:
        """Whether the run is over; raises RunError when the SuperLink is."""
        if self._child.code is not None:
            raise _fallen(self._child)
        # The SuperLink's log is free to read, but its words are nobody's promise.
        self._hinted |= any("Finished task" in line and self.run in line for line in self._child.news())
        if self._hinted or time.monotonic() - self._asked > _SELDOM:
            with suppress(RunError):  # one question that got no answer in time
                self.state = self.control.state(self.run)
            self._asked = time.monotonic()
        return self.state.ended


def _fallen(child: Child) -> RunError:
    return RunError(f"{child.end} (all that it wrote: {child.log}).")
