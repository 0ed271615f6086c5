"""Keeps one process alive: starts it, notices its end and starts it again, ends it.

    keeper = Keeper([sys.executable, "-m", "fedmezo.flower_worker"], order={"socket": ...}, env=env, log=log, say=say)
    keeper.start()
    try:
        while supernode.poll() is None:
            keeper.poll()
            time.sleep(1)
    finally:
        keeper.close()

The process gets its order, a JSON object, as the first line of its standard input, and ends when that pipe is closed,
whatever ends the keeper. On its standard output it says nothing unless it cannot begin: then one line, a JSON object
{"error": class name, "text": sentence}. One that has given a reason would give it again, so it is not started again.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from fedmezo import errors
from fedmezo.errors import FedMeZOError, RunError

__all__ = ["Keeper"]

_PATIENCE = 5.0  # seconds a process gets to end by itself
_MOST = 5  # times a process is started again ...
_WITHIN = 600.0  # ... in as many seconds
_REASON = 65536  # bytes of a reason, as many as a pipe holds


class Keeper:
    """One process and its restarts.

    Args:
      command: what is started.
      order: the first line of its standard input, as JSON.
      env: its environment; None for that of this process.
      log: the file its standard error is added to; None for that of this process.
      say: is told, in a sentence, when the process has to be started again.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        order: Mapping[str, object],
        env: Mapping[str, str] | None = None,
        log: Path | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._command, self._env, self._log, self._say = tuple(command), env, log, say
        self._order = json.dumps(order).encode() + b"\n"
        self._process: subprocess.Popen[bytes] | None = None
        self._ends: list[float] = []

    @property
    def pid(self) -> int | None:
        """The number of the process that was started last; None before the first and after `close`."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process, if none runs; raises RunError when the command or the log cannot be opened."""
        if self._process is not None and self._process.poll() is None:
            return
        self._let_go()
        try:
            self._process = self._started()
        except OSError as error:
            raise RunError(f"The worker process cannot be started: {error}.") from error
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already; `poll` sees to that
            self._process.stdin.write(self._order)

    def poll(self) -> None:
        """Starts the process again if it has ended; to be called about once a second.

        Raises:
          FedMeZOError: what the process said on why it cannot begin, as its own class.
          RunError: it has ended too often to be started once more.
        """
        if self._process is None or self._process.poll() is None:
            return
        code, failure = self._process.returncode, _reason(self._process)
        if failure is not None:
            raise failure
        now = time.monotonic()
        self._ends = [end for end in self._ends if now - end < _WITHIN] + [now]
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        why = ", perhaps for lack of memory" if code == -9 else ""
        if len(self._ends) > _MOST:
            raise RunError(
                f"The worker process {how}{why}, for the {len(self._ends)}th time within {_WITHIN / 60:g} minutes, and "
                f"is not started again; see {self._log or 'what it wrote above'}."
            )
        self._say(f"The worker process {how}{why}; it is started again ({len(self._ends)} of {_MOST} times).")
        self.start()

    def close(self) -> None:
        """Ends the process, whatever it is doing."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._let_go()

    def _started(self) -> "subprocess.Popen[bytes]":
        with nullcontext() if self._log is None else self._log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._env,
                start_new_session=True,  # Ctrl-C is for this process to handle
            )

    def _let_go(self) -> None:
        process, self._process = self._process, None
        for pipe in (process.stdin, process.stdout) if process is not None else ():
            assert pipe is not None
            pipe.close()


def _reason(process: "subprocess.Popen[bytes]") -> FedMeZOError | None:
    """Returns why a process that has ended could not begin; None if it had begun, or was given no time to tell."""
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)  # a child of it may still hold the pipe
    with suppress(BlockingIOError, ValueError, KeyError, TypeError):
        found = json.loads(os.read(process.stdout.fileno(), _REASON))
        kind = getattr(errors, found["error"], None)
        return kind(found["text"]) if kind else RunError(f"{found['error']}: {found['text']}")
    return None
