"""Programs that a verb starts and ends again: each with a log, all of them gone when the verb is.

What they start in turn is found by a mark in its environment, because Flower starts some processes in sessions of
their own and leaves one of them running when its SuperLink ends.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from uuid import uuid4

from fedmezo.errors import RunError
from fedmezo.runtime.flower.programs import Address

__all__ = ["Child", "Lines", "free_port", "listens", "settle", "tail"]

_MARK = "FEDMEZO_STARTED_BY"
_PATIENCE = 10.0  # seconds a program gets to end by itself
_PROCESSES = Path("/proc")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# Linux tells a process of its parent's death when it asks; a killed verb leaves no SuperLink behind then.
_LAUNCH = (
    "import ctypes, os, signal, sys\n"
    "if sys.platform == 'linux': ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"
    "if os.getppid() == int(sys.argv[1]): os.execvp(sys.argv[2], sys.argv[2:])"
)


class Lines:
    """The lines that are added to a file, which need not be there yet."""

    def __init__(self, path: Path, *, told: bool = True) -> None:
        """Takes the file; what is in it already counts as told, or is what `new` begins with."""
        self._path = path
        self._read = path.stat().st_size if told and path.exists() else 0

    def new(self) -> list[str]:
        """Returns the whole lines added since the last call."""
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._read)
            found = file.read()
            whole = found[: found.rfind(b"\n") + 1]  # the last line may still be on its way
            self._read += len(whole)
            return whole.decode("utf-8", "replace").splitlines()
        return []


class Child:
    """A running program.

    Attributes:
      name: what people know it as.
      log: the file that gets all it writes.
    """

    def __init__(self, name: str, command: Sequence[str], *, env: Mapping[str, str], log: Path) -> None:
        """Starts it in a session of its own: Ctrl-C is the verb's to handle.

        Raises:
          RunError: it cannot be started.
        """
        self.name, self.log, self._mark = name, log, f"{os.getpid()}:{uuid4().hex}"
        self._lines = Lines(log)
        launch = [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command]
        try:
            with log.open("ab") as file:
                self._begins = file.tell()
                self._process = subprocess.Popen(
                    launch,
                    env={**env, _MARK: self._mark},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise RunError(f"{name} cannot be started: {error}.") from error

    @property
    def pid(self) -> int:
        """The number of the process."""
        return self._process.pid

    @property
    def code(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.poll()

    @property
    def end(self) -> str:
        """How it ended, in a sentence without a full stop."""
        if (self.code or 0) < 0:
            return f"{self.name} was killed by signal {-(self.code or 0)}"
        return f"{self.name} ended with code {self.code}: {tail(self.said())}"

    def said(self) -> str:
        """Returns what it has written to its log so far."""
        with self.log.open("rb") as file:
            file.seek(self._begins)
            return file.read().decode("utf-8", "replace")

    def news(self) -> list[str]:
        """Returns the lines it has written since the last call."""
        return self._lines.new()

    def close(self) -> None:
        """Ends it and everything it started: asks, waits up to 10 s, then kills."""
        _end(lambda: [*_marked(self._mark), *([self.pid] if self.code is None else [])])
        self._process.wait()


def settle(home: Path) -> list[int]:
    """Ends what was left behind by a verb that was killed, and returns the processes of one that still runs.

    Args:
      home: the folder that Flower's programs keep their things in; by it they are found, where the system tells.
    """
    wanted = str(home.absolute())
    found = {n: told for n, told in _environments() if _MARK in told and told.get("FLWR_HOME") == wanted}
    left = [number for number, told in found.items() if not _environment(int(told[_MARK].partition(":")[0]))]
    _end(lambda: [number for number in left if _environment(number) == found[number]])
    return [number for number in found if number not in left]


def _end(running: Callable[[], list[int]]) -> None:
    for number in running():
        _send(number, signal.SIGTERM)
    until = time.monotonic() + _PATIENCE
    while running() and time.monotonic() < until:
        time.sleep(0.05)
    for number in running():
        _send(number, signal.SIGKILL)


def _send(number: int, what: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(number, what)


def _marked(mark: str) -> list[int]:
    return [number for number, told in _environments() if told.get(_MARK) == mark]


def _environments() -> Iterator[tuple[int, dict[str, str]]]:
    """Yields this user's processes and their environments, where the system tells."""
    for folder in _PROCESSES.glob("[0-9]*"):
        if told := _environment(int(folder.name)):
            yield int(folder.name), told


def _environment(number: int) -> dict[str, str]:
    """Returns a process's environment; empty for another user's, and for one that has ended."""
    with suppress(OSError):
        whole = (_PROCESSES / str(number) / "environ").read_bytes().decode("utf-8", "replace")
        return dict(part.split("=", 1) for part in whole.split("\0") if "=" in part)
    return {}


def free_port(host: str = "127.0.0.1") -> int:
    """Returns a port nobody listens on now."""
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def listens(address: Address) -> bool:
    """Whether somebody listens at an address of this machine."""
    with suppress(OSError), socket.create_connection((address.from_here.host, address.port), timeout=1):
        return True
    return False


def tail(text: str, lines: int = 3) -> str:
    """Returns the last lines that say something, on one line and without colours."""
    said = [line.strip() for line in _COLOUR.sub("", text).splitlines() if line.strip()]
    return " / ".join(said[-lines:])
