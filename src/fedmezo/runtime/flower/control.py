"""A SuperLink as its owner sees it: wait for it, make clients known to it, submit a run, ask how it is."""

import http.client
import json
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmezo.errors import ConfigError, RunError
from fedmezo.runtime.flower.children import Child, tail
from fedmezo.runtime.flower.programs import (
    Address,
    Tls,
    connection,
    environment,
    flwr_list,
    flwr_log,
    flwr_register,
    flwr_run,
)

__all__ = ["Control", "RunState", "answers", "wait_until_ready"]

_KNOWN = "already"  # in Flower's answer when a key was registered before
_RAISED = "ServerApp failed with exception: "  # how Flower begins when it tells of the app's own error
_PATIENCE = 60.0  # seconds for a SuperLink to start, and for one command


@dataclass(frozen=True)
class RunState:
    """How a run is.

    Attributes:
      status: Flower's word, such as "running" or "finished:failed".
      details: its sentence about it.
      up: bytes of messages that clients sent, with Flower's own framing, as Flower counts them.
      down: bytes of messages that were sent to clients, likewise.
    """

    status: str
    details: str
    up: int = 0
    down: int = 0

    @property
    def ended(self) -> bool:
        """Whether it is over, well or not."""
        return self.status.startswith("finished")

    @property
    def reason(self) -> str:
        """Why it failed, in the server app's words when it had any."""
        if self.status == "finished:stopped":
            return "The run was stopped by `flwr stop`."
        return self.details.removeprefix(_RAISED) if _RAISED in self.details else f"The run failed: {self.details}"

    @property
    def good(self) -> bool:
        """Whether the server app came to its end."""
        return self.status == "finished:completed"


class Control:
    """Flower's command line, bound to one SuperLink.

    Attributes:
      address: the SuperLink.
      env: the environment of the commands, for other programs of the same folder too.
    """

    def __init__(self, address: Address, *, home: Path, tls: Tls | None) -> None:
        """Takes the SuperLink and the folder that Flower's config.toml is written to.

        Raises:
          ConfigError: the folder cannot be written.
        """
        self.address, self.env = address, environment(home)
        try:
            home.mkdir(parents=True, exist_ok=True)
            (home / "config.toml").write_text(connection(address, tls=tls), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{home} cannot be written ({error.strerror}); choose another folder.") from None

    def submit(self, app: Path, *, changes: str = "") -> str:
        """Submits the run in an app folder and returns its number at the SuperLink.

        Args:
          app: the folder.
          changes: of its configuration, such as "federation.rounds=5".

        Raises:
          RunError: the SuperLink cannot be reached, or does not take it.
        """
        return str(self._ask(flwr_run(app, changes=changes))["run-id"])

    def register(self, keys: Sequence[Path]) -> int:
        """Makes public keys known to the SuperLink; returns how many were not yet.

        Raises:
          RunError: the SuperLink cannot be reached, or a file is no such key.
        """
        return sum(self._registered(key) for key in keys)

    def _registered(self, key: Path) -> bool:
        try:
            self._ask(flwr_register(key))
        except RunError as error:
            if _KNOWN not in str(error):
                raise
            return False
        return True

    def state(self, run: str) -> RunState:
        """Returns how a run is; raises RunError when the SuperLink cannot be reached or does not know it."""
        told = self._ask(flwr_list(run))["runs"][0]
        moved = told.get("network-traffic", {})
        up, down = int(moved.get("inbound-bytes", 0)), int(moved.get("outbound-bytes", 0))
        return RunState(str(told["status"]), str(told["status-details"]), up, down)

    def log(self, run: str) -> str:
        """Returns what the server app of a run has written so far, empty when that cannot be had."""
        with suppress(subprocess.TimeoutExpired):
            return self._run(flwr_log(run, follow=False)).stdout
        return ""

    def follow(self, run: str) -> RunState:
        """Prints what the server app of a run writes, on this process's output, until it ends; returns how."""
        command = flwr_log(run, follow=True)
        while not (state := self.state(run)).ended:
            subprocess.run(command, env=self.env, stdin=subprocess.DEVNULL, check=False)
        return state

    def _ask(self, command: Sequence[str]) -> dict[str, Any]:
        try:
            done = self._run(command)
        except subprocess.TimeoutExpired:
            raise RunError(f"The SuperLink at {self.address} did not answer within {_PATIENCE:g} s.") from None
        # Its exit code is 0 whatever happened, and hints may stand before the answer.
        _, brace, rest = done.stdout.partition("{")
        with suppress(json.JSONDecodeError):
            answer = json.loads(brace + rest)
            if answer.get("success"):
                return dict(answer)
            raise RunError(f"The SuperLink at {self.address} refused: {tail(str(answer.get('error-message')), 1)}")
        raise RunError(f"`flwr {' '.join(command[1:3])}` failed: {tail(done.stdout + done.stderr)}")

    def _run(self, command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            env=self.env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=_PATIENCE,
            check=False,
        )


def wait_until_ready(child: Child, address: Address, *, tls: Tls | None) -> None:
    """Waits until the SuperLink in `child` answers at `address`.

    Raises:
      RunError: it has ended, or does not answer within a minute.
    """
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        # Another program may answer at that port, so ours must be alive besides.
        if child.code is not None:
            raise RunError(child.end)
        if answers(address.from_here, tls=tls):
            return
        time.sleep(0.05)
    raise RunError(f"{child.name} does not answer at {address} after {_PATIENCE:g} s; its log is {child.log}.")


def answers(address: Address, *, tls: Tls | None) -> bool:
    """Whether a SuperLink answers at an address now.

    Raises:
      RunError: something answers, but not by these certificates, so that waiting for it would be in vain.
    """
    context = ssl.create_default_context(cafile=str(tls.ca)) if tls is not None else None
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]
    handlers += [urllib.request.HTTPSHandler(context=context)] if context is not None else []
    url = f"{'http' if tls is None else 'https'}://{address}/health"
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLError):
            raise RunError(_mistrusted(address, error.reason)) from None
        return False
    except (http.client.HTTPException, ConnectionResetError):
        raise RunError(f"What answers at {address} does not speak plain HTTP; if it wants TLS, give --certs.") from None
    except OSError:
        return False


def _mistrusted(address: Address, error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"The certificate of the server at {address} is not accepted ({error.verify_message}); name the host as in "
            "`fedmezo certs init --host`, and give the folder that was made together with that certificate."
        )
    return f"What answers at {address} does not speak TLS ({error.reason}); start the server with --certs too."
