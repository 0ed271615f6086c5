"""What the network verbs do, as lines for a shell: Flower's own commands, and what has to be there for them."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from fedmezo.runtime.flower.node import Joining
from fedmezo.runtime.flower.programs import (
    Address,
    Tls,
    connection,
    flwr_register,
    flwr_run,
    settings_of,
    superlink,
)
from fedmezo.studies.host import Hosting, database_of, home_of

__all__ = ["client_lines", "server_lines", "submit_lines"]


def server_lines(asked: Hosting, *, told: Sequence[str]) -> list[str]:
    """Returns what `fedmezo server` does.

    Args:
      asked: what the server does.
      told: the arguments that say which configuration.
    """
    home = home_of(asked.folder)
    lines = [*_prepared(home, asked.address.from_here, asked.tls)]
    if asked.config is not None:
        lines.append(_app(home / "app", told, folder=str(asked.folder)))
    lines.append(shlex.join(superlink(asked.address, database=database_of(asked.folder), tls=asked.tls)) + " &")
    lines += [shlex.join(flwr_register(key)) for key in asked.keys]
    if asked.config is not None:
        more = f" more={asked.more}" if asked.more else ""
        lines.append(shlex.join(flwr_run(home / "app", changes=f"resume=true{more}" if asked.resume else "")))
    return lines


def submit_lines(server: Address, *, tls: Tls | None, told: Sequence[str], folder: str) -> list[str]:
    """Returns what `fedmezo submit` does; `folder` is the run's, on the server."""
    home = Path("flower")
    return [*_prepared(home, server, tls), _app(home / "app", told, folder=folder), shlex.join(flwr_run(home / "app"))]


def client_lines(joining: Joining) -> list[str]:
    """Returns what `fedmezo client` does; the worker ends when its standard input does."""
    order = shlex.quote(json.dumps(joining.worker()))
    return [
        *_exports(joining.home),
        shlex.join(["mkdir", "-p", "-m", "700", str(joining.home), str(joining.socket.parent)]),
        f"(echo {order}; sleep infinity) | {shlex.join(joining.worker_command())} &",
        shlex.join(joining.command()),
    ]


def _exports(home: Path) -> list[str]:
    return [f"export {name}={shlex.quote(value)}" for name, value in settings_of(home).items()]


def _prepared(home: Path, server: Address, tls: Tls | None) -> list[str]:
    file = shlex.quote(str(home / "config.toml"))
    found = shlex.quote(connection(server, tls=tls))
    return [*_exports(home), shlex.join(["mkdir", "-p", str(home)]), f"printf %s {found} > {file}"]


def _app(app: Path, told: Sequence[str], *, folder: str) -> str:
    return shlex.join(["fedmezo", "flower", "init", str(app), *told, "--out", folder])
