"""The verb that shows a run in a browser while it goes."""

from typing import Annotated

import typer

from fedmezo.channels import aside, emit
from fedmezo.cli_config import Folder, Json

__all__ = ["watch"]


def watch(
    *,
    folder: Folder,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, metavar="N", help="Listen on 127.0.0.1:N; 8650 or any free one by default."),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            envvar="FEDMEZO_WATCH_TOKEN",
            help="The secret part of the address; a new one by default. With the same port and token an open page "
            "goes on after a restart.",
        ),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    as_json: Json = False,
) -> None:
    """Follow a run in a browser: curves, clients, bytes, memory, speed, health. For simulation and Flower runs.

    The page is on this machine only, behind a secret address. It only reads the run's folder, so start and stop it
    when you like: before the run, while it goes, after it has ended.
    """
    with aside():
        from fedmezo.studies.files import JOURNAL
        from fedmezo.studies.live import watch as follow

        page = follow(folder, port=port, token=token, open_browser=open_browser)
    with page:
        if as_json:
            emit({"url": page.url, "folder": folder})
        else:
            typer.echo(page.url)
        if not (folder / JOURNAL).exists():
            typer.echo(f"There is no run in {folder} yet; the page waits for one.", err=True)
        typer.echo("Stop the page with Ctrl-C; the run goes on.", err=True)
        try:
            page.wait()
        except KeyboardInterrupt:
            typer.echo("", err=True)
