"""A server and its clients on this machine, started as a user types them; for tests of the whole way through Flower.

with Cluster(tmp_path, 2, settings=["model.name=builtin:tiny", "federation.rounds=2"]) as cluster:
    summary = cluster.result()
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent
READY = "Start every client"  # the server's line when clients can join
JOINED = "Connected to"  # a client's line when it has


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """Returns this environment, where the package under test is found from every folder."""
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}


class Program:
    """One `fedmezo` verb: its standard output and its lines for people in files."""

    def __init__(self, name: str, arguments: Sequence[object], *, folder: Path) -> None:
        self.name = name
        self.out, self.err = folder / f"{name}.out", folder / f"{name}.err"
        command = [sys.executable, "-m", "fedmezo", *map(str, arguments)]
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=folder,
                env=environment(),
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def said(self) -> str:
        return self.err.read_text()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> int:
        """Sends a signal, waits, and returns the exit code; kills after 20 s."""
        with suppress(ProcessLookupError):
            self.process.send_signal(how)
        try:
            return self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


class Cluster:
    """A `fedmezo server` and `clients` times `fedmezo client` on the loopback; both sides end with the scope.

    Args:
      work: a folder for everything; the run itself goes to work/run.
      clients: how many.
      tls: with certificates and keys that `fedmezo certs init` makes.
      config: a configuration file.
      settings: KEY=VALUE of the run; without these and config the server only listens.
      own: a client's own records, by client; a client without takes its share of the run's.
      extra: further arguments of every client.
    """

    def __init__(
        self,
        work: Path,
        clients: int,
        *,
        tls: bool = False,
        config: Path | None = None,
        settings: Sequence[str] = (),
        own: dict[int, Path] | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.work, self.run, self.port = work, work / "run", free_port()
        self._config, self._settings, self._own, self._extra = config, list(settings), own or {}, list(extra)
        self._tls, self._count = tls, clients
        self.clients: dict[int, Program] = {}
        self._started: list[Program] = []
        self.times: dict[str, float] = {}

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def certs(self) -> Path:
        return self.work / "certs"

    def __enter__(self) -> "Cluster":
        try:
            began = time.monotonic()
            if self._tls:
                self.call("certs", "init", self.certs, "--clients", self._count)
            self.start_server()
            self.times["server"] = time.monotonic() - began
            for number in range(self._count):
                self.start_client(number)
            for number in range(self._count):
                self.wait_for_client(number)
            self.times["clients"] = time.monotonic() - began
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_server(self, *, resume: bool = False, rounds: int | None = None) -> Program:
        what = ["--resume", self.run] if resume else [*([self._config] if self._config else []), "--out", self.run]
        what += [] if resume else [part for one in self._settings for part in ("--set", one)]
        what += ["--rounds", rounds] if rounds else []
        secure = ["--certs", self.certs] if self._tls else []
        self.server = self._start(
            f"server-{len(self._started)}", ["server", *what, *secure, "--port", self.port, "--json"]
        )
        self.until(lambda: READY in self.server.said(), self.server, seconds=60)
        return self.server

    def start_client(self, number: int, *more: str) -> Program:
        secure = ["--certs", self.certs / f"client-{number}"] if self._tls else []
        data = ["--data", self._own[number]] if number in self._own else []
        told = [
            "--server",
            self.address,
            "--id",
            number,
            "--state",
            self.work / f"client-{number}",
            *self._extra,
            *more,
        ]
        name = f"client-{number}-{len(self._started)}"
        self.clients[number] = self._start(name, ["client", "--trust", *told, *secure, *data])
        return self.clients[number]

    def wait_for_client(self, number: int) -> None:
        client = self.clients[number]
        self.until(lambda: JOINED in client.said(), client, seconds=120)

    def result(self, *, seconds: float = 180.0) -> dict:
        """Waits for the run's end and returns its summary."""
        self.until(lambda: self.server.code is not None, None, seconds=seconds)
        if self.server.code != 0:
            raise AssertionError(f"The server ended with {self.server.code}.\n{self.report()}")
        return json.loads(self.server.out.read_text())

    def call(self, *arguments: object) -> str:
        """Returns what a verb prints, which must end well."""
        command = [sys.executable, "-m", "fedmezo", *map(str, arguments)]
        done = subprocess.run(command, env=environment(), cwd=self.work, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def until(self, true: Callable[[], bool], program: Program | None, *, seconds: float) -> None:
        """Waits until something is true; `program` must not end before."""
        limit = time.monotonic() + seconds
        while not true():
            if program is not None and program.code is not None:
                raise AssertionError(f"{program.name} ended with {program.code}.\n{self.report()}")
            if time.monotonic() > limit:
                raise AssertionError(f"Not so within {seconds:g} s.\n{self.report()}")
            time.sleep(0.05)

    def report(self) -> str:
        """Returns the ends of all logs."""
        logs = [path for program in self._started for path in (program.err, program.out)]
        logs += sorted(self.work.glob("*/flower/*.log"))
        return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)

    def close(self) -> None:
        """Ends everything: all get the signal before any is waited for."""
        running = [program for program in self._started if program.code is None]
        for program in running:
            with suppress(ProcessLookupError):
                program.process.send_signal(signal.SIGTERM)
        for program in running:
            program.stop()

    def _start(self, name: str, arguments: Sequence[object]) -> Program:
        program = Program(name, arguments, folder=self.work)
        self._started.append(program)
        return program
