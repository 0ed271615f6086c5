"""The verb `client`."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmezo.channels import aside, saying
from fedmezo.cli_across import Certs, Dry, Insecure, Server, print_lines, tls_of
from fedmezo.cli_config import Quiet, Settings, stoppable
from fedmezo.errors import ConfigError

if TYPE_CHECKING:
    from fedmezo.runtime.flower.node import Joining

__all__ = ["client"]

Port = Annotated[
    int | None,
    typer.Option(min=1, max=65535, metavar="PORT", help="For this client's own processes; a free one by default."),
]


def client(
    *,
    to: Server,
    number: Annotated[int, typer.Option("--id", min=0, metavar="N", help="Which client this is, from 0.")],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="This client's own records; they never leave this machine.")
    ] = None,
    settings: Settings = None,
    certs: Certs = None,
    insecure: Insecure = False,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the model between starts, and the logs, here.")
    ] = None,
    port: Port = None,
    threads: Annotated[int | None, typer.Option(min=1, metavar="N", help="CPU threads of the walks.")] = None,
    trust: Annotated[
        bool, typer.Option("--trust", help="Let the server name any model, and any file of this machine as data.")
    ] = False,
    dry_run: Dry = False,
    quiet: Quiet = False,
) -> None:
    """Take part in the runs of a server, with the data of this machine, until stopped.

    Model and data stay in memory between rounds. Only slopes go to the server.
    """
    from fedmezo.runtime.flower.node import Joining
    from fedmezo.runtime.flower.programs import Address, need_flower

    need_flower()
    at = Address.parse(to)
    tls = tls_of(at, certs, insecure=insecure, side="client")
    order = {
        "state": str(state.absolute()) if state else None,
        "settings": [*_own(data), *(settings or ())],
        "own": data is not None,
        "threads": threads,
        "trusting": trust,
    }
    with _places(state, number, make=not dry_run) as (home, door):
        joining = Joining(at, number, order, tls, home, door, port)
        if dry_run:
            from fedmezo.studies.byhand import client_lines

            print_lines(client_lines(joining), as_json=False)
        else:
            _take_part(joining, say=saying(quiet=quiet))


def _take_part(joining: "Joining", *, say: Callable[[str], None]) -> None:
    from fedmezo.runtime.flower.node import Node

    stopped = f"Stopped; start client {joining.client} again when you like, and it takes part again."
    with stoppable(stopped), aside(), Node(joining, say=say) as node:
        while True:
            node.look()
            time.sleep(0.5)


@contextmanager
def _places(state: Path | None, number: int, *, make: bool) -> Iterator[tuple[Path, Path]]:
    """Lends the folder of Flower's things and logs, and the path of the worker's socket, which must be short."""
    from fedmezo.runtime.flower.children import settle

    if not make:
        room = Path(tempfile.gettempdir(), f"fedmezo-client-{number}")
        yield (state.absolute() if state else room) / "flower", room / "worker.sock"
        return
    with tempfile.TemporaryDirectory(prefix="fedmezo-") as name:
        home = (state.absolute() if state else Path(name)) / "flower"
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--state: {state} cannot be written ({error.strerror}); choose another.") from None
        if others := settle(home):
            raise ConfigError(f"--state: a client with {state} still runs (process {others[0]}); stop it first.")
        yield home, Path(name, "worker.sock")


def _own(data: Path | None) -> list[str]:
    if data is None:
        return []
    if not data.exists():
        raise ConfigError(f"--data: there is no file {data}.")
    return [f"data.path={data.absolute()}"]
