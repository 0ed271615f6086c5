"""What the verbs for runs over a network have in common: options and certificates."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmezo.channels import emit
from fedmezo.errors import ConfigError

if TYPE_CHECKING:
    from fedmezo.runtime.flower.programs import Address, Tls

__all__ = ["Certs", "Dry", "Insecure", "Server", "print_lines", "tls_of"]

Certs = Annotated[Path | None, typer.Option("--certs", metavar="DIR", help="Files that `fedmezo certs init` made.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Do without certificates, so without encryption.")]
Dry = Annotated[bool, typer.Option("--dry-run", help="Print Flower's own commands and start nothing.")]
Server = Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where the server listens.")]


def tls_of(at: "Address", certs: Path | None, *, insecure: bool, side: str) -> "Tls | None":
    """Returns the files to use, or None for an open connection, which must be asked for where others could listen in.

    Args:
      at: the server.
      certs: the folder given.
      insecure: whether an open connection was asked for.
      side: "server", "client", or "command" for one that only talks to the server.

    Raises:
      ConfigError: neither was given where one is needed, or both, or a file is missing.
    """
    from fedmezo.runtime.flower.certs import client_tls, server_tls, trusted_tls

    if certs is not None and insecure:
        raise ConfigError("--certs and --insecure exclude each other; give one of them.")
    if certs is not None:
        return {"server": server_tls, "client": client_tls, "command": trusted_tls}[side](certs.absolute())
    if not (at.loopback or insecure):
        raise ConfigError(
            f"{at} is reached over a network, so it needs --certs, with files of `fedmezo certs init`, or "
            "--insecure to do without."
        )
    return None


def print_lines(lines: Sequence[str], *, as_json: bool) -> None:
    """Prints commands on standard output."""
    if as_json:
        emit({"commands": list(lines)})
    else:
        typer.echo("\n".join(lines))
