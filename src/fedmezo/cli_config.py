"""The verbs about configuration files, and what several verbs share: options, a way to stop."""

import json
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import click
import typer

from fedmezo.channels import emit
from fedmezo.errors import ConfigError, StoppedError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fedmezo.studies.config import Config

__all__ = [
    "Folder", "Json", "Out", "Quiet", "Round", "Settings", "Source", "config_app", "draw", "mistake", "read_config",
    "show", "stoppable",
]  # fmt: skip

config_app = typer.Typer(help="Show, describe or begin a configuration.", rich_markup_mode="markdown")

Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on standard output, everything else on standard error.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one key of the configuration: `--set federation.rounds=5`. Repeatable.",
    ),
]
Source = Annotated[Path | None, typer.Argument(metavar="[CONFIG]")]
Folder = Annotated[Path, typer.Argument(metavar="DIR")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to write.")]
Round = Annotated[
    int | None, typer.Option("--round", min=0, metavar="N", help="The model after N rounds; the last by default.")
]


def read_config(path: Path | None, settings: Sequence[str] | None) -> "Config":
    """Returns the checked configuration of a file and `--set` overrides; pydantic is imported only now."""
    from fedmezo.studies.config import load_config

    return load_config(path, settings or ())


def mistake(error: click.UsageError) -> str:
    """Returns what is wrong with a command line, and where to look; a key given as an option is told as a key."""
    from fedmezo.studies.config import keys_called

    name = error.option_name.lstrip("-").replace("-", "_") if isinstance(error, click.NoSuchOption) else ""
    if isinstance(error, click.NoSuchOption) and (keys := keys_called(name)):
        told = " or ".join(f"--set {key}=VALUE" for key in keys)
        return f"No such option '{error.option_name}'; it is a key of the configuration, so give {told}."
    verb = error.ctx.command_path if error.ctx else "fedmezo"
    # click and typer each add their own guess.
    text = re.sub(r" \(Did you mean one of: [^)]*\)", "", error.format_message())
    return f"{text} See `{verb} --help`."


def show(result: Mapping[str, Any], *, as_json: bool, kind: str = "facts") -> None:
    """Prints a result: one JSON object, or a table for people."""
    if as_json:
        emit(result)
        return
    from fedmezo.studies.screen import facts_table, summary_table

    draw(summary_table(result) if kind == "summary" else facts_table(result))


def draw(table: "RenderableType") -> None:
    """Prints a table on standard output, its lines as long as they are."""
    from rich.console import Console

    Console(highlight=False).print(table, soft_wrap=True)


@contextmanager
def stoppable(told: str) -> Iterator[None]:
    """Lends a scope that Ctrl-C and SIGTERM end with a sentence; what cleans up in it is not interrupted again."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        for name in wanted:
            signal.signal(name, signal.SIG_IGN)
        raise KeyboardInterrupt

    wanted = (signal.SIGINT, signal.SIGTERM)
    before = {name: signal.signal(name, interrupt) for name in wanted}
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError(told) from None
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@config_app.callback(invoke_without_command=True)
def _config(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@config_app.command("show")
def config_show(*, config: Source = None, settings: Settings = None, as_json: Json = False) -> None:
    """Print the configuration in force: the file, your changes, and the defaults of all the rest."""
    wanted = read_config(config, settings)
    if as_json:
        emit(wanted.model_dump(mode="json"))
    else:
        typer.echo(wanted.to_toml(), nl=False)


@config_app.command("schema")
def config_schema(*, as_json: Json = False) -> None:
    """Print the JSON schema of a configuration file, for editors."""
    from fedmezo.studies.config import schema

    typer.echo(json.dumps(schema(), indent=None if as_json else 2))


@config_app.command("init")
def config_init(
    *,
    path: Annotated[Path, typer.Argument(metavar="[FILE]", show_default=False)] = Path("fedmezo.toml"),
    like: Annotated[
        str | None, typer.Option(metavar="NAME", help="A ready configuration instead, such as demo, dolly or gsm8k.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Json = False,
) -> None:
    """Write a configuration with every key, what it means and its default; or a ready one."""
    from fedmezo.studies.config import template_toml

    text = template_toml() if like is None else _ready(like)
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path} is there already; name another file, or give --force to write over it.") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}.") from None
    if as_json:
        emit({"path": path})
    else:
        typer.echo(f"Wrote {path}. Change what you need, then: fedmezo run {path}")


def _ready(name: str) -> str:
    """Returns the text of one of the configurations that come with the package; those of configs/ in the source."""
    folder = files("fedmezo") / "assets" / "configs"
    known = sorted(path.name.removesuffix(".toml") for path in folder.iterdir())
    if name not in known:
        raise ConfigError(f"--like: there is no ready configuration {name!r}; there are {', '.join(known)}.")
    return (folder / f"{name}.toml").read_text(encoding="utf-8")
