"""Forks of a process that has imported everything, and the library that lets them die at the n-th write."""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHIM = "FEDMEZO_CRASH_SHIM"
MODES = {"off": 0, "before": 1, "torn": 2, "full": 3, "fails": 4}
Tell = Callable[[dict[str, Any]], None]
Work = Callable[[Tell], None]


def preloaded() -> ctypes.CDLL:
    """Returns the shim; when it is not loaded yet, starts this program again with it."""
    path = os.environ.get(SHIM)
    if path is None:
        path = str(Path(tempfile.mkdtemp(prefix="crash-")) / "shim.so")
        source = Path(__file__).with_name("shim.c")
        subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", path, str(source), "-ldl"], check=True)
        environment = {**os.environ, "LD_PRELOAD": path, SHIM: path}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)
    return ctypes.CDLL(path)


@dataclass(frozen=True)
class End:
    """How a child ended: its signal, 0 when it ended by itself; what it told; the calls it made, where counted."""

    signal: int
    told: list[dict[str, Any]]
    calls: list[str] = field(default_factory=list)

    @property
    def error(self) -> str:
        """Returns the sentence of an error that is raised on purpose, or nothing."""
        return next((one["error"] for one in self.told if "error" in one), "")

    @property
    def bug(self) -> str:
        """Returns any other error, or nothing."""
        return next((one["bug"] for one in self.told if "bug" in one), "")

    @property
    def rounds(self) -> int:
        """Returns how many rounds it told of."""
        return sum("round" in one for one in self.told)


@dataclass
class Child:
    """A fork of this process that does some work."""

    work: Work
    pid: int = 0
    read: int = 0

    def begin(self) -> "Child":
        """Starts it and returns itself."""
        self.read, write = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self.read)
            _work(self.work, write)
        os.close(write)
        return self

    def end(self, *, kill_after: float | None = None) -> End:
        """Waits for its end, and brings it about where seconds are given."""
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(self.pid, signal.SIGKILL)
        with os.fdopen(self.read) as pipe:
            lines = pipe.read().splitlines()
        _, status = os.waitpid(self.pid, 0)
        told = []
        for line in lines:
            with contextlib.suppress(ValueError):  # the last line of a killed process may be cut
                told.append(json.loads(line))
        return End(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0, told)


def _work(work: Work, write: int) -> None:
    def tell(what: dict[str, Any]) -> None:
        os.write(write, (json.dumps(what) + "\n").encode())

    from fedmezo.errors import FedMeZOError

    try:
        work(tell)
    except FedMeZOError as error:
        tell({"error": f"{type(error).__name__}: {error}"})
    except BaseException as error:
        tell({"bug": f"{type(error).__name__}: {error}"[:300]})
    os._exit(0)


def forked(work: Work, *, kill_after: float | None = None) -> End:
    return Child(work).begin().end(kill_after=kill_after)
