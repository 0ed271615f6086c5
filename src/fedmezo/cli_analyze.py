"""The verbs that measure what a configuration is up against, before a run."""

from dataclasses import asdict
from typing import Annotated

import typer

from fedmezo.channels import aside, emit
from fedmezo.cli_config import Json, Settings, Source, read_config

__all__ = ["analyze_app"]

analyze_app = typer.Typer(help="Measure, before a run, what it is up against.", rich_markup_mode="markdown")


@analyze_app.callback(invoke_without_command=True)
def _analyze(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@analyze_app.command("noise")
def noise(
    *,
    config: Source = None,
    settings: Settings = None,
    dtype: Annotated[
        str, typer.Option(metavar="NAME,...", help="Number formats, as model.dtype.")
    ] = "float32,bfloat16",
    quantize: Annotated[
        str, typer.Option(metavar="NAME,...", help="Formats of the frozen weights, as model.quantize.")
    ] = "none,int8,int4",
    mu: Annotated[str, typer.Option(metavar="X,...", help="Values of algorithm.mu.")] = "1e-4,1e-3,1e-2,1e-1",
    directions: Annotated[int, typer.Option(min=2, metavar="N", help="Slopes per row.")] = 32,
    spread: Annotated[
        str, typer.Option(metavar="X,...", help="How far the adapter is off its start; 0 is the start.")
    ] = "0,0.01",
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, only the result.")] = False,
) -> None:
    """How much of a two-point slope is signal, per number format and mu.

    The yardstick is the float32 model along the same directions, on the first batch of the first client. `ratio` is
    signal over noise, `alike` the correlation of the slopes; `rounding` is the part of the noise that grows as 1 / mu,
    `bend` what the distance of the two points costs in float32.
    """
    wanted = read_config(config, settings)
    with aside():
        from fedmezo.studies.bench import read_list
        from fedmezo.studies.signal import signal_rows, signal_table

        rows = signal_rows(
            wanted,
            dtypes=read_list(dtype, option="--dtype") or (),
            quantize=read_list(quantize, option="--quantize") or (),
            mus=read_list(mu, option="--mu", of=float) or (),
            directions=directions,
            spreads=read_list(spread, option="--spread", of=float) or (),
            say=lambda text: None if quiet else typer.echo(text, err=True),
        )
    if as_json:
        emit({"rows": [asdict(row) for row in rows]})
        return
    from rich.console import Console

    Console(highlight=False).print(signal_table(rows), soft_wrap=True)
