"""A comparison in the terminal: progress on standard error, tables of what came out."""

import math
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.progress import Progress, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from fedmezo.studies.compare.rows import COLUMNS, Row, measured, rate_text, spread_text
from fedmezo.studies.compare.runs import Job, Onlooker, Outcome
from fedmezo.studies.page import DASH, duration, number

__all__ = ["CompareScreen", "compare_table"]

_ABREAST = 4  # arms that fit on 80 columns


class CompareScreen(Onlooker):
    """Shows a comparison on standard error: a line per run that ended, and below them those that go on."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._bar = Progress(
            TextColumn("{task.description}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("begins")
        self._total = self._done = 0
        self._now: dict[Job, TaskID] = {}

    def __enter__(self) -> Self:
        """Begins to draw."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the bar away and leaves the lines above it."""
        self._bar.stop()

    def planned(self, count: int) -> None:
        """Takes how many runs there will be."""
        self._total = count
        self._count()

    def begun(self, job: Job) -> None:
        """Shows a run that starts."""
        self._now[job] = self._bar.add_task(f"  {_name(job)}: begins")
        if self._bar.disable:
            self._say(f"{self._place()} {_name(job)}: begins")

    def heard(self, job: Job, *, rounds: int, loss: float) -> None:
        """Shows how far a run is."""
        told = f"loss {number(loss)}" if math.isfinite(loss) else "judging the model"
        self._bar.update(self._now[job], description=f"  {_name(job)}: {told}, round {rounds}")

    def ended(self, outcome: Outcome) -> None:
        """Shows a run that ended."""
        job, summary = outcome.job, outcome.summary
        if job in self._now:
            self._bar.remove_task(self._now.pop(job))
        self._done += 1
        if outcome.error:
            self._say(f"{self._place()} {_name(job)}: failed: {outcome.error}", style="red")
        else:
            costs = f"{summary.get('rounds')} rounds, {duration(summary.get('seconds'))}"
            self._say(f"{self._place()} {_name(job)}: loss {number(outcome.loss)}, {costs}")
        self._count()

    def note(self, text: str) -> None:
        """Shows a sentence."""
        self._say(text, style="yellow")

    def _place(self) -> str:
        wide = len(str(self._total))
        return f"[{self._done:>{wide}}/{self._total}]"

    def _count(self) -> None:
        self._bar.update(self._task, description=f"{self._done} of {self._total} runs done")

    def _say(self, text: str, style: str = "") -> None:
        self._bar.console.print(Text(text, style=style), soft_wrap=True)


def _name(job: Job) -> str:
    rate = job.config.algorithm.rate
    at = "own rate" if rate is None else f"rate {rate:g}"
    return f"{job.arm}, {COLUMNS.get(job.column, job.column)}, {at}, seed {job.seed}"


def compare_table(result: Mapping[str, Any]) -> RenderableType:
    """Returns the end of a comparison: a table per kind of rate, what may be said of it, and where the page is."""
    parts: list[RenderableType] = []
    for column, title in COLUMNS.items():
        entries = [entry for entry in result["arms"] if entry["column"] == column]
        parts += [Text(title.capitalize(), style="bold")] if entries else []
        for at in range(0, len(entries), _ABREAST):
            parts += [_table(entries[at : at + _ABREAST], result["rows"]), Text()]
    parts += [Text(line) for line in _sentences(result)]
    where = result["page"] or f"{result['out']}/compare.json"
    return Group(*parts, Text(f"\nPage: {where}"))


def _table(entries: Sequence[Row], rows: Sequence[Row]) -> Table:
    """Returns one column per arm and one line per measure."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", header_style="bold", no_wrap=True)
    for entry in entries:
        table.add_column(entry["arm"], justify="right", header_style="bold", overflow="fold")
    table.add_row("rate", *(rate_text(entry["rate"]) for entry in entries))
    for measure in measured(rows):
        table.add_row(measure.title.lower(), *(spread_text(entry[measure.name], measure) for entry in entries))
    runs = [f"{len(e['seeds'])}" + (f", {len(e['failed'])} failed" if e["failed"] else "") for e in entries]
    table.add_row("runs", *(run or DASH for run in runs))
    return table


def _sentences(result: Mapping[str, Any]) -> Iterator[str]:
    for column in ("both", *COLUMNS):
        said = [entry["text"] for entry in result["verdicts"] if entry["column"] == column]
        if said and column in COLUMNS:
            yield f"{COLUMNS[column].capitalize()}:"
        yield from (f"- {text}" for text in said)
    if result["notes"]:
        yield "To be read with:"
        yield from (f"- {note}" for note in result["notes"])
