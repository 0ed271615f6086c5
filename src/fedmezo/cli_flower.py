"""The verbs on the server's side of a run over a network: server, submit, certs, flower."""

import socket
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmezo.channels import aside, emit
from fedmezo.cli_across import Certs, Dry, Insecure, Server, print_lines, tls_of
from fedmezo.cli_config import Json, Quiet, Settings, Source, read_config, show, stoppable
from fedmezo.errors import ConfigError, RunError

if TYPE_CHECKING:
    from fedmezo.runtime.flower.programs import Address, Tls
    from fedmezo.studies.config import Config
    from fedmezo.studies.host import Hosting

__all__ = ["certs_app", "flower_app", "server", "submit"]

certs_app = typer.Typer(help="Make the files by which a server and its clients know each other.")
flower_app = typer.Typer(help="Write a run as a Flower App.")

_OPEN_DOOR = (
    "Warning: whoever reaches {0} can start programs on the server and on every client, because Flower's control port "
    "asks for no password; let nobody but your clients reach it, by a firewall or a private network."
)


def server(
    *,
    config: Source = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the run.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="DIR", help="Go on with the run in this folder.")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rounds in all; as configured by default.")
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="HOST", help="Listen here; 0.0.0.0 for all of this machine's addresses.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, metavar="PORT", help="Listen on this port.")] = 8000,
    certs: Certs = None,
    insecure: Insecure = False,
    dry_run: Dry = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune a model over clients on other machines, each of them a `fedmezo client`.

    Without CONFIG, --set and --resume it only listens, and `fedmezo submit` brings the runs.

    Every round is journaled before the next begins: stop it when you like and go on with --resume DIR.
    """
    from fedmezo.runtime.flower.programs import Address, need_flower

    need_flower()
    at = Address(host, port)
    tls = tls_of(at, certs, insecure=insecure, side="server")
    asked = _hosting(at, tls, certs, config=config, settings=settings, out=out, resume=resume, rounds=rounds)
    if dry_run:
        from fedmezo.studies.byhand import server_lines

        told = [str(resume / "config.toml")] if resume else _told(config, settings)
        print_lines(server_lines(asked, told=told), as_json=as_json)
    elif (summary := _serve(asked, certs, quiet=quiet)) is not None:
        show(summary, as_json=as_json, kind="summary")


def submit(
    *,
    config: Source = None,
    to: Server,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the run, on the server's machine.")],
    settings: Settings = None,
    certs: Certs = None,
    insecure: Insecure = False,
    follow: Annotated[bool, typer.Option("--follow", help="Print what the server says until the run ends.")] = False,
    dry_run: Dry = False,
    as_json: Json = False,
) -> None:
    """Submit a run to a server that is up."""
    from fedmezo.runtime.flower.control import Control
    from fedmezo.runtime.flower.folder import write_app
    from fedmezo.runtime.flower.programs import Address, need_flower

    need_flower()
    wanted, at = read_config(config, settings), Address.parse(to)
    tls = tls_of(at, certs, insecure=insecure, side="command")
    folder = str(out.absolute() if at.loopback else out)
    if not Path(folder).is_absolute():
        raise ConfigError(f"--out: expected a folder on the server's machine from its root on, got {out}.")
    if dry_run:
        from fedmezo.studies.byhand import submit_lines

        print_lines(submit_lines(at, tls=tls, told=_told(config, settings), folder=folder), as_json=as_json)
        return
    from fedmezo.studies.appconfig import app_config

    stopped = f"Interrupted; what the server has taken goes on, in {folder} there."
    with tempfile.TemporaryDirectory(prefix="fedmezo-") as name, stoppable(stopped), aside():
        control = Control(at, home=Path(name), tls=tls)
        write_app(Path(name, "app"), app_config(wanted, folder=folder))
        run = control.submit(Path(name, "app"))
        typer.echo(f"The server has taken the run as number {run}.", err=True)
        ended = control.follow(run) if follow else None
    if ended is not None and not ended.good:
        raise RunError(ended.reason)
    show({"run": run, "folder": folder}, as_json=as_json)


@certs_app.command("init")
def certs_init(
    *,
    where: Annotated[Path, typer.Argument(metavar="DIR")],
    host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="A name or address by which clients reach the server, besides localhost. Repeatable."
        ),
    ] = None,
    clients: Annotated[int, typer.Option(min=1, metavar="N", help="Clients that get a key.")],
    days: Annotated[int, typer.Option(min=1, metavar="N", help="How long the certificates are valid.")] = 365,
    as_json: Json = False,
) -> None:
    """Make an authority, the server's certificate, and a key for every client."""
    from fedmezo.runtime.flower.certs import make_certificates

    paths = make_certificates(where, hosts=host or (), clients=clients, days=days)
    if as_json:
        emit({"files": paths})
        return
    typer.echo(f"Wrote {len(paths)} files to {where}.")
    typer.echo(f"The server reads {where}. Copy {where}/client-N, and nothing else, to the machine of client N.")


@flower_app.command("init")
def flower_init(
    *,
    where: Annotated[Path, typer.Argument(metavar="DIR")],
    config: Source = None,
    settings: Settings = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the run, on the server's machine.")
    ] = Path("runs/flower"),
    as_json: Json = False,
) -> None:
    """Write the folder of a Flower App, for those who prefer `flwr run`."""
    from fedmezo.runtime.flower.folder import write_app
    from fedmezo.studies.appconfig import app_config

    if (where / "pyproject.toml").exists():
        raise ConfigError(f"{where} holds a pyproject.toml already; name another folder.")
    write_app(where, app_config(read_config(config, settings), folder=str(out)))
    if as_json:
        emit({"path": where})
    else:
        typer.echo(f"Wrote {where}. Submit it with: flwr run {where}")


def _hosting(
    at: "Address",
    tls: "Tls | None",
    certs: Path | None,
    *,
    config: Path | None,
    settings: list[str] | None,
    out: Path | None,
    resume: Path | None,
    rounds: int | None,
) -> "Hosting":
    """Returns what a server is asked to do, and refuses what contradicts itself."""
    from fedmezo.runtime.flower.certs import keys_in
    from fedmezo.studies.host import Hosting, known_config

    if resume and (config or settings or out):
        raise ConfigError("--resume goes on with a run as it was begun; give no CONFIG, --set or --out with it.")
    if rounds and not (resume or config or settings):
        raise ConfigError("--rounds is for a run; give a CONFIG, --set or --resume.")
    if rounds and not resume:
        settings = [*(settings or ()), f"federation.rounds={rounds}"]
    wanted = known_config(resume) if resume else read_config(config, settings) if config or settings else None
    folder = resume or out or _new_folder(wanted, config)
    keys = tuple(keys_in(certs.absolute())) if certs else ()
    more = rounds or 0 if resume else 0
    return Hosting(at, folder.absolute(), tls, keys, wanted, resume=resume is not None, more=more)


def _new_folder(config: "Config | None", path: Path | None) -> Path:
    if config is None:
        return Path("runs", "server")
    if config.output.dir is not None:
        return Path(config.output.dir).expanduser()
    return Path("runs", f"{path.stem if path else 'run'}-{datetime.now():%Y%m%d-%H%M%S}")


def _serve(asked: "Hosting", certs: Path | None, *, quiet: bool) -> "dict[str, object] | None":
    from fedmezo.studies.host import host
    from fedmezo.studies.screen import Screen

    def ready() -> None:
        for line in _how_to_join(asked, certs):
            typer.echo(line, err=True)

    if asked.config is None:
        stopped = "Stopped."
    else:
        stopped = f"Interrupted; no finished round is lost. Go on with: fedmezo server --resume {asked.folder}"
    with stoppable(stopped), aside(), Screen(folder=asked.folder, quiet=quiet, clients=True) as watch:
        found = host(asked, watch=watch, ready=ready if not quiet else lambda: None)
        return dict(found) if found is not None else None


def _how_to_join(asked: "Hosting", certs: Path | None) -> Iterator[str]:
    """Yields what to do next, for people."""
    from fedmezo.runtime.flower.certs import ALWAYS, server_names
    from fedmezo.runtime.flower.programs import Address

    at, name = asked.address, asked.address.host
    if not at.loopback:
        names = [found for found in server_names(asked.tls) if found not in ALWAYS] if asked.tls else []
        name = (names or [socket.gethostname()])[0] if at.from_here != at else name
        yield _OPEN_DOOR.format(at)
    extra = " --certs client-0" if asked.tls else "" if at.loopback else " --insecure"
    yield "Start every client on its machine, with its own number:"
    yield f"  fedmezo client --server {Address(name, at.port)} --id 0{extra}"
    if asked.tls and certs:
        yield f"  (client-0 stands for its own folder of {certs}, copied to that machine; client-1 for --id 1, ...)"
    if asked.config is None:
        yield "Submit a run with:"
        yield f"  fedmezo submit CONFIG --server {at.from_here} --out DIR{f' --certs {certs}' if certs else ''}"


def _told(config: Path | None, settings: Sequence[str] | None) -> list[str]:
    return [*([str(config)] if config else []), *(part for one in settings or () for part in ("--set", one))]
