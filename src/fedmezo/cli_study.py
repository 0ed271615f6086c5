"""The verbs `study list`, `study run`, `study check` and `study report`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmezo.channels import aside, emit
from fedmezo.cli_config import Json, Quiet, draw, stoppable
from fedmezo.errors import ConfigError, RunError

if TYPE_CHECKING:
    from fedmezo.studies.suite import Study
    from fedmezo.studies.suite.cells import Cell
    from fedmezo.studies.suite.records import Record

__all__ = ["study_app"]

study_app = typer.Typer(
    help="The paper's tables and figures as studies, each claim with a verdict.", rich_markup_mode="markdown"
)


class ScaleName(StrEnum):
    """How large a study is run."""

    tiny = "tiny"
    small = "small"
    paper = "paper"


Studies = Annotated[Path, typer.Option("--studies", metavar="DIR", help="Folder of the studies' TOML files.")]
Records = Annotated[Path, typer.Option("--records", metavar="DIR", help="Folder of the raw records.")]
Scaled = Annotated[ScaleName, typer.Option(help="tiny (two cores) | small (a 135M model) | paper (a 3B model, a GPU).")]
Names = Annotated[list[str] | None, typer.Argument(metavar="[NAME]...")]
_STUDIES, _RECORDS = Path("studies"), Path("studies/records")


def _chosen(folder: Path, names: Sequence[str] | None) -> dict[str, Study]:
    from fedmezo.studies.suite import load_studies

    found = load_studies(folder)
    odd = [name for name in names or () if name not in found]
    if odd:
        raise ConfigError(f"There is no study {odd[0]!r} in {folder}; there are {', '.join(found)}.")
    return {name: study for name, study in found.items() if not names or name in names}


@study_app.command("list")
def study_list(*, studies: Studies = _STUDIES, records: Records = _RECORDS, as_json: Json = False) -> None:
    """Tell which studies there are, what they ask, and how many of their cells have a record."""
    from fedmezo.studies.suite import Store
    from fedmezo.studies.suite.screen import listing, listing_table

    rows = listing(_chosen(studies, None), Store(records))
    if as_json:
        emit({"studies": rows})
    else:
        draw(listing_table(rows))


@study_app.command("run")
def study_run(
    *,
    names: Names = None,
    scale: Scaled = ScaleName.tiny,
    seeds: Annotated[int | None, typer.Option(min=1, metavar="N", help="Paired seeds; as the study says.")] = None,
    grid: Annotated[list[str] | None, typer.Option(metavar="NAME", help="These grids only; may be repeated.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="FACTOR=LEVEL", help="These levels only; may be repeated.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Cells at once, one thread each.")] = 1,
    studies: Studies = _STUDIES,
    records: Records = _RECORDS,
    quiet: Quiet = False,
) -> None:
    """Run the cells that have no record yet, of some studies or of all.

    Stop it when you like and go on with the same command.
    """
    from fedmezo.studies.suite import Store, run_study

    wanted = _levels(only or ())
    with stoppable("Interrupted; every finished cell is kept. Go on with the same command."):
        for name, study in _chosen(studies, names).items():
            if scale not in study.scales:
                typer.echo(f"{name}: not offered at scale {scale}.", err=True)
                continue
            with aside():
                run_study(
                    study, scale, store=Store(records), seeds=seeds, grids=grid or (), only=wanted, workers=workers,
                    watch=_Told(name, quiet=quiet),
                )  # fmt: skip


def _levels(given: Sequence[str]) -> dict[str, list[str]]:
    """Returns factor -> levels of arguments like rate=default."""
    found: dict[str, list[str]] = {}
    for text in given:
        factor, sign, level = text.partition("=")
        if not (factor and sign and level):
            raise ConfigError(f"--only is FACTOR=LEVEL, such as rate=default; got {text!r}.")
        found.setdefault(factor, []).append(level)
    return found


class _Told:
    """Tells of cells on standard error, one line each."""

    def __init__(self, name: str, *, quiet: bool) -> None:
        self.name, self.quiet = name, quiet

    def planned(self, *, cells: int, there: int, waiting: Sequence[str]) -> None:
        """Says what there is to do."""
        self._say(f"{cells} cells, {there} have a record.")
        for text in waiting:
            self._say(f"Some cells are left out: {text}")

    def done(self, cell: Cell, record: Record, *, left: int) -> None:
        """Says what came out of a cell."""
        self._say(f"{cell.label}: {record.error or f'{record.cpu:.1f} s'} ({left} left)")

    def _say(self, text: str) -> None:
        if not self.quiet:
            typer.echo(f"{self.name}: {text}", err=True)


@study_app.command("protocol")
def study_protocol(*, names: Names = None, studies: Studies = _STUDIES) -> None:
    """Print what studies ask, of which cells and by which rules, as Markdown: the tables of the protocol."""
    from fedmezo.studies.suite import protocol_of

    typer.echo("\n".join(map(protocol_of, _chosen(studies, names).values())), nl=False)


@study_app.command("check")
def study_check(
    *, names: Names = None, scale: Scaled = ScaleName.tiny, studies: Studies = _STUDIES, records: Records = _RECORDS
) -> None:
    """Run the cheapest recorded cell of each study again; exit code 1 when it differs from its record."""
    from fedmezo.studies.suite import Store, check_one

    wrong: list[str] = []
    store = Store(records)
    for name, study in _chosen(studies, names).items():
        if names or store.of(name, scale):
            with aside():
                wrong += [f"{name}: {text}" for text in check_one(study, scale, store=store)]
    if wrong:
        raise RunError("\n".join(wrong))
    typer.echo("The records stand.")


@study_app.command("report")
def study_report(
    *,
    studies: Studies = _STUDIES,
    records: Records = _RECORDS,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the site.")] = Path("studies/site"),
    as_json: Json = False,
) -> None:
    """Judge all records and write the site: a first page with every claim, and a page for each study."""
    from fedmezo.studies.suite import Store, write_site

    page = write_site(_chosen(studies, None), store=Store(records), out=out)
    if as_json:
        emit({"page": page, "verdicts": out / "verdicts.json"})
    else:
        typer.echo(f"Wrote {page}.")
