"""The verb `compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fedmezo.channels import aside, emit
from fedmezo.cli_config import Json, Quiet, Settings, draw, stoppable

__all__ = ["compare"]


def compare(
    *,
    config: Annotated[list[Path] | None, typer.Argument(metavar="[CONFIG]...")] = None,
    budget: Annotated[
        str,
        typer.Option(metavar="KIND=AMOUNT", help="What a run may spend: rounds | forwards | tokens | seconds | bytes."),
    ],
    algorithms: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="The arms: one configuration with each of these algorithms.")
    ] = None,
    seeds: Annotated[str, typer.Option(metavar="N,...", help="federation.seed of the runs.")] = "0,1,2",
    rate: Annotated[
        float | None, typer.Option(metavar="RATE", help="Run all arms at this rate (column: equal).")
    ] = None,
    tune: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[ARM=]RATE,...",
            help="Choose each arm's rate from these, on another seed (column: tuned). Repeatable.",
        ),
    ] = None,
    tune_budget: Annotated[
        str | None, typer.Option(metavar="KIND=AMOUNT", help="Of a tuning run; --budget when left out.")
    ] = None,
    settings: Settings = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where to write, or an earlier one to go on with.")
    ] = Path("runs/compare"),
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs at once.")] = 1,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare algorithms under one equal budget, at equal rates and at tuned rates, over several seeds.

    A first try: `fedmezo compare --algorithms fedmezo,fedavg --budget tokens=90000 --set model.name=builtin:tiny`

    Stop it when you like and go on with the same command.
    """
    from fedmezo.studies import compare as study
    from fedmezo.studies.compare.screen import CompareScreen

    arms = study.read_arms(config or [], algorithms=study.parse_list(algorithms or ""), settings=settings or ())
    terms = study.Terms(
        budget=study.parse_budget(budget),
        seeds=study.parse_seeds(seeds),
        rate=rate,
        tune=study.parse_grids(tune or ()),
        tune_budget=study.parse_budget(tune_budget, option="--tune-budget") if tune_budget else None,
        jobs=jobs,
    )
    told = "Interrupted; no finished round is lost. Go on with the same command."
    with stoppable(told), aside(), CompareScreen(quiet=quiet) as watch:
        result = study.compare(arms, terms, out=out, watch=watch)
    _show(result, as_json=as_json)


def _show(result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit(result)
        return
    from fedmezo.studies.compare.screen import compare_table

    draw(compare_table(result))
