"""The verbs that measure what a configuration is up against, before a run."""

from dataclasses import asdict
from typing import Annotated

import typer

from fedmezo.channels import aside, emit, saying
from fedmezo.cli_config import Json, Quiet, Settings, Source, draw, read_config

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
    quiet: Quiet = False,
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
            say=saying(quiet=quiet),
        )
    if as_json:
        emit({"rows": [asdict(row) for row in rows]})
        return
    draw(signal_table(rows))


@analyze_app.command("rank")
def rank(
    *,
    config: Source = None,
    settings: Settings = None,
    method: Annotated[
        str, typer.Option(metavar="NAME", help="forward, backprop (needs the extra `analyze`), or both.")
    ] = "forward",
    directions: Annotated[int, typer.Option(metavar="N", help="Samples of each trace.")] = 64,
    steps: Annotated[int, typer.Option(metavar="N", help="Lanczos steps for the ends of a spectrum.")] = 16,
    batches: Annotated[
        int | None,
        typer.Option(metavar="N", help="Batches, dealt to the clients in turn; by default 1 each, 8 at most."),
    ] = None,
    mu: Annotated[
        float | None,
        typer.Option(metavar="X", help="Radius of the forward passes; 0.01 by default, full models 0.001."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Also every layer alone.")] = False,
    after: Annotated[int, typer.Option(metavar="ROUNDS", help="Also after so many rounds of the run.")] = 0,
    spread: Annotated[float, typer.Option(metavar="X", help="How far the parameters are off their start.")] = 0.0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The effective rank r = tr(H) / |H| of the clients' mean loss in the trained parameters.

    The paper's rate hangs on r <= 200; its Conjecture 3.8 says that r is at most the LoRA rank. Forward passes alone
    bound r; backpropagation gives the Hessian's, and that of the Gauss-Newton matrix, which has no negative eigenvalue.
    """
    wanted = read_config(config, settings)
    with aside():
        from fedmezo.studies.rank import RankOptions, rank_rows, rank_table, rank_words

        asked = RankOptions(
            method, directions, steps, batches=batches, mu=mu, layers=layers, after=after, spread=spread
        )
        rows = rank_rows(wanted, asked, say=saying(quiet=quiet))
    if as_json:
        emit({"rows": [asdict(row) for row in rows]})
        return
    draw(rank_table(rows))
    for words in rank_words(rows):
        typer.echo(f"\n{words}")


_Points = Annotated[
    int, typer.Option(metavar="N", help="Points: the start, near it, then as the run leads on. At least 2.")
]
_Directions = Annotated[int, typer.Option(metavar="N", help="Directions at every point; errors are about sqrt(2 / N).")]
_Batches = Annotated[
    int, typer.Option(metavar="N", help="Batches per client and direction, at least 2; more for small ones.")
]


@analyze_app.command("constants")
def constants(
    *,
    config: Source = None,
    settings: Settings = None,
    directions: _Directions = 64,
    batches: _Batches = 2,
    points: _Points = 3,
    spread: Annotated[float, typer.Option(metavar="X", help="Of the second point, start + X z.")] = 0.01,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The constants of Assumptions 1, 3, 4 and 6, from forward passes: L, r, c_g, sigma_g2, c_h, sigma_h2.

    The later points lie on the run's own way, two rounds apart. --json is what `fedmezo plan --constants FILE` reads.
    """
    wanted = read_config(config, settings)
    with aside():
        from fedmezo.studies.constants import measure_constants
        from fedmezo.studies.constants_table import constants_table
        from fedmezo.studies.sampling import SamplingOptions

        asked = SamplingOptions(directions, batches, points, spread=spread)
        measured = measure_constants(wanted, asked=asked, say=saying(quiet=quiet))
    if as_json:
        emit(measured.as_dict())
        return
    draw(constants_table(measured))


@analyze_app.command("heterogeneity")
def heterogeneity(
    *,
    config: Source = None,
    settings: Settings = None,
    directions: _Directions = 64,
    batches: _Batches = 2,
    points: _Points = 3,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """How unlike the clients are: gradients and losses from forward passes, and the labels they hold.

    `apart^2` is |grad f_i - grad f|^2, `TV` and `JS` are the total variation distance and Jensen-Shannon divergence
    (bits) of a client's labels from everyone's. Every number measured has its 95 % interval.
    """
    wanted = read_config(config, settings)
    with aside():
        from fedmezo.studies.constants_table import heterogeneity_table
        from fedmezo.studies.heterogeneity import measure_heterogeneity
        from fedmezo.studies.sampling import SamplingOptions

        asked = SamplingOptions(directions, batches, points)
        found = measure_heterogeneity(wanted, asked=asked, say=saying(quiet=quiet))
    if as_json:
        emit(found.as_dict())
        return
    draw(heterogeneity_table(found))


@analyze_app.command("mu")
def mu_window(
    *,
    config: Source = None,
    settings: Settings = None,
    directions: Annotated[int, typer.Option(min=2, metavar="N", help="Directions, each on a batch of its own.")] = 16,
    as_json: Json = False,
) -> None:
    """Where mu may lie for this model, number format and data, from forward passes only.

    Slopes along the same directions at a ladder of mus differ by `rounding`, which grows as 1 / mu, and `bend`, which
    grows as mu^2. A mu is usable where both together are at most a third of the signal. With algorithm.mu = "auto" a
    run does the same with 4 directions.
    """
    wanted = read_config(config, settings)
    with aside():
        from fedmezo.studies.build import build
        from fedmezo.studies.window import window_of
        from fedmezo.studies.window_table import window_dict, window_table, window_words

        built = build(wanted, measure=False)
        window = window_of(built.config, built.bench, directions=directions)
        words = window_words(window, dtype=wanted.model.dtype, asked=wanted.algorithm.mu)
    if as_json:
        emit({"model": wanted.model.name, "dtype": wanted.model.dtype, **window_dict(window), "advice": words})
        return
    draw(window_table(window))
    typer.echo(f"\n{words}")
