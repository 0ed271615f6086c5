"""The command lines of Flower's programs, as a user would type them, and the environment they run in.

Flower's stable surface is its commands and its messages, so its programs are started and nothing of it is imported.
"""

import importlib.util
import ipaddress
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fedmezo.errors import ConfigError, missing

__all__ = [
    "CONNECTION",
    "Address",
    "Tls",
    "connection",
    "environment",
    "flwr_list",
    "flwr_log",
    "flwr_register",
    "flwr_run",
    "need_flower",
    "settings_of",
    "superlink",
    "supernode",
]

CONNECTION = "fedmezo"  # the name of our SuperLink in Flower's config.toml
_TESTED = "1.41"  # Flower refuses to talk to another minor version, and its commands change with it
_SETTINGS = {
    # Without these Flower calls its makers' machines, and a run fails where there is no package index.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    # Seconds between two looks for a message: the only one of Flower's pauses that can be set; 1 by default.
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
}
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True)
class Address:
    """A host and a port; its text is what Flower's commands take."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "Address":
        """Returns the address that HOST:PORT stands for; an IPv6 host has brackets.

        Raises:
          ConfigError: it is none.
        """
        host, _, port = text.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not bare or (":" in bare) != (bare != host) or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ConfigError(f"--server: expected HOST:PORT, as in 192.168.1.5:8000, got {text!r}.")
        return cls(bare, int(port))

    def __str__(self) -> str:
        """Returns HOST:PORT."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def from_here(self) -> "Address":
        """Where this machine finds a server that listens here; 0.0.0.0 means all of its addresses, so the loopback."""
        return Address(_ANY.get(self.host, self.host), self.port)


@dataclass(frozen=True)
class Tls:
    """Files that secure a connection.

    Attributes:
      ca: the certificate everybody trusts.
      cert: the server's certificate.
      key: the server's key; for a SuperNode, the private key by which it is known.
    """

    ca: Path
    cert: Path | None = None
    key: Path | None = None


def need_flower() -> None:
    """Checks that Flower is there, in the version these command lines are for.

    Raises:
      ConfigError: it is not.
    """
    if importlib.util.find_spec("flwr") is None:
        raise missing("This needs Flower", extra="flower")
    found = version("flwr")
    if not f"{found}.".startswith(f"{_TESTED}."):
        raise ConfigError(f"This needs Flower {_TESTED}, got {found}; run: pip install 'fedmezo[flower]'")


def settings_of(home: Path) -> dict[str, str]:
    """Returns what Flower's programs need in their environment.

    Args:
      home: the folder they keep their things in; it is made absolute.
    """
    return {"FLWR_HOME": str(home.absolute()), **_SETTINGS}


def environment(home: Path) -> dict[str, str]:
    """Returns this process's environment with `settings_of(home)`; programs of this Python's folder are found first."""
    here = str(Path(sys.executable).parent)
    return {**os.environ, **settings_of(home), "PATH": os.pathsep.join([here, os.environ.get("PATH", os.defpath)])}


def superlink(address: Address, *, database: Path, tls: Tls | None) -> list[str]:
    """Returns the command of the server's side; with `tls` it also wants a registered key from every SuperNode."""
    where = ["--host", address.host, "--port", str(address.port), "--database", str(database)]
    if tls is None:
        return ["flower-superlink", "--insecure", *where]
    files = ["--ssl-ca-certfile", str(tls.ca), "--ssl-certfile", str(tls.cert), "--ssl-keyfile", str(tls.key)]
    return ["flower-superlink", *files, "--enable-supernode-auth", *where]


def supernode(server: Address, *, tls: Tls | None, own: Address, config: Mapping[str, str | int]) -> list[str]:
    """Returns the command of a client's side.

    Args:
      server: the SuperLink.
      tls: the certificate to trust and this node's private key; None for an open connection.
      own: where the node serves its own processes.
      config: the node configuration.
    """
    told = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
    where = ["--superlink", str(server), "--host", own.host, "--port", str(own.port), "--node-config", told]
    if tls is None:
        return ["flower-supernode", "--insecure", *where]
    key = ["--auth-supernode-private-key", str(tls.key)] if tls.key is not None else []
    return ["flower-supernode", "--root-certificates", str(tls.ca), *key, *where]


def flwr_run(app: Path, *, changes: str = "") -> list[str]:
    """Returns the command that submits an app folder, with changes to its configuration such as "resume=true".

    Its answer is JSON with "run-id".
    """
    told = ["--run-config", changes] if changes else []
    return ["flwr", "run", str(app), CONNECTION, *told, "--format", "json"]


def flwr_list(run: str) -> list[str]:
    """Returns the command that tells how a run is; its answer is JSON."""
    return ["flwr", "list", "--run-id", run, CONNECTION, "--format", "json"]


def flwr_log(run: str, *, follow: bool) -> list[str]:
    """Returns the command that prints what the server app of a run wrote, until the run ends or only what is there."""
    return ["flwr", "log", run, CONNECTION, *([] if follow else ["--show"])]


def flwr_register(key: Path) -> list[str]:
    """Returns the command that makes a SuperNode's public key known; its answer is JSON."""
    return ["flwr", "supernode", "register", str(key), CONNECTION, "--format", "json"]


def connection(address: Address, *, tls: Tls | None) -> str:
    """Returns the config.toml by which Flower's command line finds a SuperLink."""
    how = "insecure = true" if tls is None else f"root-certificates = {json.dumps(str(tls.ca.absolute()))}"
    head = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
    return f"{head}address = {json.dumps(str(address))}\n{how}\n"
