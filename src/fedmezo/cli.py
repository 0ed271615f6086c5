"""The command `fedmezo`: the library's verbs for a terminal.

Heavy modules are imported inside the verbs, so that help and configuration answer at once. With --json a verb prints
one JSON object on standard output and everything else on standard error.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer
from typer.core import TyperArgument

from fedmezo import __version__
from fedmezo.channels import aside, fail, saying
from fedmezo.cli_analyze import analyze_app
from fedmezo.cli_bench import bench
from fedmezo.cli_client import client
from fedmezo.cli_compare import compare
from fedmezo.cli_config import Folder, Json, Quiet, Settings, Source, config_app, mistake, read_config, show
from fedmezo.cli_flower import certs_app, flower_app, server, submit
from fedmezo.cli_study import study_app
from fedmezo.cli_use import ask, doctor, evaluate, export, report, rollback, verify
from fedmezo.cli_watch import watch
from fedmezo.errors import ConfigError, FedMeZOError, StoppedError

if TYPE_CHECKING:
    from fedmezo.studies.config import Config
    from fedmezo.studies.screen import Screen

__all__ = ["main"]

app = typer.Typer(
    name="fedmezo",
    help="Tune a language model on data that stays on many machines, with forward passes only.",
    epilog="First steps: `fedmezo run` tunes a small model on a built-in corpus; `fedmezo config init` writes a "
    "commented configuration; `fedmezo VERB --help` explains a verb.",
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(config_app, name="config", rich_help_panel="Prepare")
app.add_typer(analyze_app, name="analyze", rich_help_panel="Prepare")
app.command(rich_help_panel="Tune")(compare)
app.add_typer(study_app, name="study", rich_help_panel="Tune")
app.command("eval", rich_help_panel="Use")(evaluate)
app.command(rich_help_panel="Use")(ask)
app.command(rich_help_panel="Use")(export)
for verb in (server, client, submit):
    app.command(rich_help_panel="Across machines")(verb)
app.add_typer(certs_app, name="certs", rich_help_panel="Across machines")
app.add_typer(flower_app, name="flower", rich_help_panel="Across machines")
for verb in (watch, doctor, verify, rollback, report, bench):
    app.command(rich_help_panel="Look after")(verb)


# The help of each positional argument, by its name.
ARGUMENTS = {
    "config": "A TOML configuration; the defaults when left out.",
    "folder": "The folder of a run.",
    "target": "The folder of a run, adapter or model.",
    "prompt": "The question, in quotes.",
    "name": "Such as smollm2-135m.",
    "names": "Studies; all of them when left out.",
    "path": "The file to write; fedmezo.toml by default.",
    "where": "The folder to make.",
    "what": "noise | step | simulate | replay | memory | all.",
}


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"fedmezo {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(rich_help_panel="Tune")
def run(
    config: Source = None,
    settings: Settings = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder of the run; runs/NAME-TIME by default.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune a model over simulated clients.

    A first try, without any download: `fedmezo run --set model.name=builtin:tiny`

    Every round is journaled before the next begins: stop it when you like and go on with `fedmezo resume DIR`.
    """
    wanted = read_config(config, settings)
    folder = out or _folder_of(wanted, config)
    with _watching(folder, quiet=quiet) as watch:
        from fedmezo.studies import run as study

        summary = study.run(wanted, out=folder, watch=watch)
    show(summary.as_dict(), as_json=as_json, kind="summary")


@app.command(rich_help_panel="Tune")
def resume(
    folder: Folder,
    rounds: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Rounds in all; as configured by default.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes that walk; as configured by default.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a run that was stopped, or add rounds to one that ended; the bits are those of an unstopped run."""
    with _watching(folder, quiet=quiet) as watch:
        from fedmezo.studies import run as study

        summary = study.resume(folder, rounds=rounds, workers=workers, watch=watch)
    show(summary.as_dict(), as_json=as_json, kind="summary")


@app.command(rich_help_panel="Prepare")
def plan(
    config: Source = None,
    settings: Settings = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure the theory's constants first, and say what they mean.")
    ] = False,
    constants: Annotated[
        Path | None, typer.Option("--constants", metavar="FILE", help="From `fedmezo analyze constants --json`.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a run will cost, from a short probe: forward passes, tokens, bytes, memory, time.

    With the constants of its losses also which rates the theory allows, and how far a round is likely to lead.
    """
    wanted = read_config(config, settings)
    if measure and constants:
        raise ConfigError("--measure and --constants both say where the constants come from; give one of them.")
    with aside():
        from fedmezo.studies import plan as study
        from fedmezo.studies.constants import measure_constants
        from fedmezo.studies.forecast import in_words
        from fedmezo.studies.measured import load_measured

        known = load_measured(constants) if constants else None
        if measure:
            known = measure_constants(wanted, say=saying())
        result = study.plan(wanted, **({"measured": known} if known else {}))
    if known and not as_json:
        result["theory"] = in_words(result.get("theory"))
    show(result, as_json=as_json)


@app.command(rich_help_panel="Prepare")
def fetch(name: Annotated[str, typer.Argument(metavar="NAME")], as_json: Json = False) -> None:
    """Download a known model, check it and keep it in the cache."""
    with aside():
        from fedmezo.models.fetch import fetch as bring

        path = bring(name, say=saying())
    show({"name": name, "path": path}, as_json=as_json)


def _folder_of(config: "Config", path: Path | None) -> Path:
    """Returns the folder a run gets when none is given: its name and the time."""
    if config.output.dir is not None:
        return Path(config.output.dir).expanduser()
    name = path.stem if path else (config.data.name or config.data.path or "run").split(":")[-1].split("/")[0]
    return Path("runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


@contextmanager
def _watching(folder: Path, *, quiet: bool) -> Iterator["Screen"]:
    """Lends a watcher; Ctrl-C becomes the sentence that tells how to go on."""
    from fedmezo.studies.files import JOURNAL
    from fedmezo.studies.screen import Screen

    watch = Screen(folder=folder, quiet=quiet)
    try:
        with aside(), watch:
            yield watch
    except KeyboardInterrupt:
        if watch.folder is not None and (watch.folder / JOURNAL).exists():
            raise StoppedError(
                f"Interrupted; no finished round is lost. Go on with: fedmezo resume {watch.folder}"
            ) from None
        raise StoppedError("Interrupted before the run began; start it again.") from None


def _command() -> click.Command:
    """Returns the whole command; arguments get their help again, which click 8.5 takes from them under typer 0.20."""
    command = typer.main.get_command(app)
    waiting = [command]
    while waiting:
        verb = waiting.pop()
        waiting += getattr(verb, "commands", {}).values()
        for argument in verb.params:
            if isinstance(argument, TyperArgument) and argument.help is None:
                argument.help = ARGUMENTS.get(str(argument.name))
    return command


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0 done, 1 a failed run, 2 a mistake in what was asked for, 130 stopped by the user."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _command().main(args=given, prog_name="fedmezo", standalone_mode=False)
        if code == StoppedError.exit_code:
            raise StoppedError("Interrupted.")
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        return fail(error, mistake(error), given=given, code=2)
    except FedMeZOError as error:
        return fail(error, str(error), given=given, code=error.exit_code)
    except (click.Abort, KeyboardInterrupt) as error:
        return fail(error, "Interrupted.", given=given, code=StoppedError.exit_code)
    # The last resort: a bug is told in one line, and the traceback only to those who ask.
    except Exception as error:
        text = " ".join(f"Unexpected {type(error).__name__}: {error}".split())
        return fail(error, f"{text} (set FEDMEZO_DEBUG=1 for the traceback)", given=given, code=1)
