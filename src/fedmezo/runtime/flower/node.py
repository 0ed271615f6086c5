"""A client's side of a run over Flower: the worker process with model and data, and the SuperNode that brings messages.

with Node(joining, say=print) as node:
    while True:
        node.look()
        time.sleep(1)
"""

import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from fedmezo.errors import RunError
from fedmezo.runtime.flower.children import Child, Lines, free_port, tail
from fedmezo.runtime.flower.control import answers
from fedmezo.runtime.flower.programs import Address, Tls, environment, supernode
from fedmezo.runtime.keeper import Keeper

__all__ = ["Joining", "Node"]

_SAID = "fedmezo: "  # how a line of the worker's log begins that is for the person at the client
_QUIET = 10.0  # seconds without an answer before that is said
_PAUSE = 3.0  # seconds before a SuperNode is started again
_LONG_PAUSE = 10.0  # the same after it was turned away; each start costs seconds of CPU
_TURNED_AWAY = re.compile(r"\[code: 2004\]")  # Flower's: the key is unknown, or its node is still thought connected


@dataclass(frozen=True)
class Joining:
    """Who joins what.

    Attributes:
      server: the SuperLink.
      client: the client's number.
      order: what the worker process is told, except for "socket" and "client".
      tls: the certificate to trust and this client's key; None for an open connection.
      home: the folder of the logs and of what Flower keeps; it must be there.
      socket: path of the worker's socket, a short one in a folder of its own.
      port: where the SuperNode serves its own processes; None for a free one.
    """

    server: Address
    client: int
    order: Mapping[str, object]
    tls: Tls | None
    home: Path
    socket: Path
    port: int | None = None

    def command(self) -> list[str]:
        """Returns the SuperNode's command."""
        own = Address("127.0.0.1", self.port or free_port())
        told: dict[str, str | int] = {"worker": str(self.socket), "client-id": self.client}
        return supernode(self.server, tls=self.tls, own=own, config=told)

    def worker_command(self) -> list[str]:
        """Returns the worker's command."""
        return [sys.executable, "-m", "fedmezo.flower_worker"]

    def worker(self) -> dict[str, object]:
        """Returns the worker's whole order."""
        return {"socket": str(self.socket), "client": self.client, **self.order}


class Node:
    """Both programs of a client; a context manager that starts and ends them."""

    def __init__(self, joining: Joining, *, say: Callable[[str], None], patience: float = 100.0) -> None:
        """Takes who joins what, and who hears sentences about it.

        Args:
          joining: see there.
          say: hears sentences for the person at the client.
          patience: seconds to go on when the server turns the client away: Flower takes a minute to see that an
            earlier start of it was killed.
        """
        self._joining, self._say, self._patience = joining, say, patience
        self._env = environment(joining.home)
        log = joining.home / "worker.log"
        self._keeper = Keeper(joining.worker_command(), order=joining.worker(), env=self._env, log=log, say=say)
        self._worker = Lines(log)
        self._child: Child | None = None
        self._away_since: float | None = None
        self._again = 0.0

    def __enter__(self) -> Self:
        """Starts both programs."""
        self._keeper.start()
        self._start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends both programs."""
        if self._child is not None:
            self._child.close()
        self._keeper.close()

    def look(self) -> None:
        """Tells what is new, and starts again what has ended and may; to be called about once a second.

        Raises:
          RunError: the client cannot take part; the sentence says why.
        """
        self._keeper.poll()
        for line in self._worker.new():
            if line.startswith(_SAID):
                self._say(line.removeprefix(_SAID))
        if self._child is None:
            if time.monotonic() >= self._again:
                self._start()
            return
        for line in self._child.news():
            self._hear(line)
        if self._child.code is not None:
            self._ended(self._child)
        elif not self._connected and time.monotonic() - self._since > _QUIET:
            self._probe()

    def _start(self) -> None:
        joining = self._joining
        self._child = Child("Flower's SuperNode", joining.command(), env=self._env, log=joining.home / "supernode.log")
        self._since, self._connected, self._silent = time.monotonic(), False, False

    def _hear(self, line: str) -> None:
        if "SuperNode ID:" in line:
            self._connected, self._away_since = True, None
            self._say(f"Connected to {self._joining.server} as client {self._joining.client}.")
        elif "Connection attempt failed" in line and self._connected:
            self._since, self._connected, self._silent = time.monotonic(), False, False
        elif "Receiving:" in line:
            self._connected = True

    def _probe(self) -> None:
        # Raises where waiting would be in vain: a wrong certificate, TLS on one side only.
        there = answers(self._joining.server, tls=self._joining.tls)
        if not there and not self._silent:
            self._say(f"No server answers at {self._joining.server}; trying until one does.")
        elif there and self._silent:
            self._say(f"A server answers at {self._joining.server} again.")
        self._since, self._silent = time.monotonic(), not there

    def _ended(self, child: Child) -> None:
        """Lets a SuperNode that has ended start again after a pause, if that may help."""
        said = child.said()
        child.close()
        if child.code == 0:
            self._say("The server was started afresh, or has let this client go; joining again.")
        elif _TURNED_AWAY.search(said):
            self._turned_away()
        elif "address already in use" not in said or self._joining.port is not None:
            # Raises where the two sides do not fit, which Flower's own words do not tell.
            answers(self._joining.server, tls=self._joining.tls)
            raise RunError(f"Flower's SuperNode ended with code {child.code}: {_reason(said)}")
        pause = _LONG_PAUSE if self._away_since is not None else _PAUSE
        self._child, self._again = None, time.monotonic() + pause

    def _turned_away(self) -> None:
        now = time.monotonic()
        who = f"The server at {self._joining.server} does not let client {self._joining.client} in"
        if self._away_since is None:
            self._away_since = now
            self._say(
                f"{who}: its key is not registered there, or an earlier start of it is not given up yet, which takes a "
                "minute; trying again."
            )
        if now - self._away_since > self._patience:
            raise RunError(
                f"{who} (Flower's exit code 305): its key is not registered there, or another machine uses it; give "
                "--certs the folder that the server's `fedmezo certs init` made for this client."
            )


def _reason(said: str) -> str:
    """Returns why Flower ended a program: what stands under its own exit code, else the last lines."""
    _, found, rest = said.partition("Exit Code: ")
    return tail("Exit Code: " + rest.partition("For more information")[0], 4) if found else tail(said)
