"""What a person sees in the terminal: progress while a run goes on, and tables of what came out.

Progress goes to standard error, results to standard output; on a pipe the bar becomes a line now and then.
"""

import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from fedmezo.studies.attendance import Attendance
from fedmezo.studies.page import count, duration, number, privacy_words, size

__all__ = ["Screen", "facts_table", "summary_table"]

_WIDE = 112  # columns that the long form of the progress line needs
_LINES = 20  # lines a run may take on a pipe, besides those of its evaluations
_COUNTS = ("tokens", "examples")  # part of every evaluation, and never changing
_UNITS: Mapping[str, Callable[[float], str]] = {
    "bytes": size,
    "seconds": duration,
    "_mb": lambda megabytes: f"{megabytes:,.0f} MB",
}
_FILES = {
    "report.html": "the report, for a browser",
    "adapter": "the tuned weights, for peft and transformers",
    "journal.sqlite": "the whole run, for resume, verify and export",
    "config.toml": "the configuration in force",
    "tensorboard": "curves, for tensorboard --logdir",
    "wandb": "curves, for wandb sync",
    "privacy.key": "the secret that this run's noise is made of; show it to nobody",
    "MANIFEST.json": "the seal: what `fedmezo verify` compares every byte with",
}


class _Board(Progress):
    """A bar with a line per client above it, where there are any."""

    attendance: Attendance | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yields the lines, then the bar."""
        if self.attendance is not None:
            yield self.attendance
        yield from super().get_renderables()


class Screen:
    """A watcher of a run that shows it on standard error.

    Attributes:
      folder: the run's folder, as far as known.

    Args:
      folder: see above.
      quiet: show nothing.
      clients: show a line per client too: when it was heard last, its loss, rate and bytes.
    """

    def __init__(self, *, folder: Path | None = None, quiet: bool = False, clients: bool = False) -> None:
        self.folder = folder
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._attendance = Attendance() if clients else None
        self._bar = _Board(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[facts]}"),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            transient=True,
        )
        self._bar.attendance = self._attendance
        self._task: TaskID = self._bar.add_task("preparing", total=None, facts="")
        self._began = time.monotonic()
        self._first: int | None = None
        self._bytes = 0

    def __enter__(self) -> Self:
        """Begins to draw."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Takes the bar away and leaves the lines above it."""
        self._bar.stop()

    def start(self, info: Mapping[str, Any]) -> None:
        """Says what the run is, once model and data are there."""
        if info.get("run_dir"):
            self.folder = Path(str(info["run_dir"]))
        told = [
            f"{count(info['dim'])} trained numbers" if info.get("dim") else "",
            f"{info['clients']} client{'s' * (info['clients'] != 1)}" if info.get("clients") else "",
            f"{info['rounds']} round{'s' * (info['rounds'] != 1)}" if info.get("rounds") else "",
            f"rate {info['rate']:.3g}" if info.get("rate") else "",
            f"mu {info['mu']:.3g}" if info.get("mu") else "",
        ]
        self._say(", ".join(filter(None, told)))
        self._say(_holdings(info))
        done = int(info.get("done") or 0)
        self._bar.update(self._task, description=f"round {done + 1}", facts="judging the model, then the first steps")
        self._began = time.monotonic()

    def round(self, report: Any) -> None:
        """Shows one round: a `RoundReport`."""
        done = report.round + 1
        # A guard may go back to before the first round seen here, in a run that was gone on with.
        self._first = report.round if self._first is None else min(self._first, report.round)
        self._bytes += report.bytes_up + report.bytes_down
        if self._attendance is not None:
            self._attendance.hear(report)
        facts = self._facts(report, long=self._console.width >= _WIDE)
        self._bar.update(
            self._task, description=f"round {done}/{report.rounds}", total=report.rounds, completed=done, facts=facts
        )
        for split, metrics in report.evaluations.items():
            self._say(f"round {done}/{report.rounds}  {split}: {_metrics(metrics)}")
        if self._bar.disable and done % math.ceil(report.rounds / _LINES) == 0:
            self._say(f"round {done}/{report.rounds}  {self._facts(report, long=True)}")
            for row in self._attendance.rows() if self._attendance is not None else ():
                self._say("  client {client}: loss {loss}, rate {rate}, {up} up, {down} down, {seen}".format(**row))
        for kind, detail in report.events:
            self.note(f"round {done}, {kind}: {detail}")

    def note(self, text: str) -> None:
        """Shows a sentence."""
        self._say(text, style="yellow")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Notes where the run lies; the summary itself is the caller's to show."""
        self.folder = Path(str(summary["run_dir"])) if summary.get("run_dir") else self.folder

    def _say(self, text: str, style: str = "") -> None:
        if text:
            self._bar.console.print(Text(text, style=style), soft_wrap=True)

    def _facts(self, report: Any, *, long: bool) -> str:
        left = report.rounds - report.round - 1
        pace = (time.monotonic() - self._began) / (report.round + 1 - (self._first or 0))
        speed = number(report.forwards / report.seconds, 3) if report.seconds > 0 else "0"
        clip = f"clip {number(report.clip, 3)}" if 0 < report.clip < math.inf else ""
        parts = [
            f"loss {number(report.loss)}",
            f"rate {report.rate:.3g}",
            clip,
            f"epsilon {number(report.epsilon, 3)}" if report.epsilon is not None else "",
            f"{size(self._bytes)} sent" if long else size(self._bytes),
            f"{speed} forwards/s" if long else f"{speed}/s",
            f"{_clock(left * pace)} left" if long else _clock(left * pace),
        ]
        return ("  " if long else " ").join(filter(None, parts))


def _holdings(info: Mapping[str, Any]) -> str:
    """Returns who holds how many examples, and what was dropped on the way."""
    sizes = sorted(dict(info.get("sizes") or {}).values())
    if not sizes:
        return ""
    held = f"{sizes[0]}" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]}"
    dropped = dict(info.get("dropped") or {})
    lost = "; dropped: " + ", ".join(f"{many} {reason}" for reason, many in dropped.items()) if dropped else ""
    return f"{held} training examples per client{lost}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _metrics(metrics: Mapping[str, Any]) -> str:
    """Returns the metrics of the whole split on one line; those of its categories are for the tables."""
    shown = {name: value for name, value in metrics.items() if isinstance(value, int | float) and "/" not in name}
    return ", ".join(f"{_words(name)} {number(value)}" for name, value in shown.items() if name not in _COUNTS)


def _words(metric: str) -> str:
    """Returns a metric's name for people: category/colour/loss is the loss on colour."""
    kind, _, rest = metric.partition("/")
    group, _, name = rest.rpartition("/")
    return f"{name} on {group}" if kind == "category" and group else metric.replace("_", " ")


def _pairs(rows: Sequence[tuple[str, str]], indent: str = "") -> Text:
    """Returns two columns as plain lines, so that no path, command or digest is ever broken."""
    wide = max((len(name) for name, _ in rows), default=0)
    lines = [Text.assemble(indent, (name.ljust(wide + 2), "bold"), value) for name, value in rows]
    return Text("\n").join(lines)


def summary_table(summary: Mapping[str, Any]) -> RenderableType:
    """Returns the end of a run as tables: before and after, costs, files, and what to try next."""
    parts: list[RenderableType] = [_gains(summary.get("eval") or {}), Text(), _pairs(list(_costs(summary)))]
    folder = summary.get("run_dir")
    if folder:
        files = [(name, what) for name, what in _FILES.items() if Path(folder, name).exists()]
        quoted, verb = shlex.quote(str(folder)), "server --resume" if summary.get("flower") else "resume"
        tries = [
            ("judge it again", f"fedmezo eval {quoted}"),
            ("one ordinary model", f"fedmezo export {quoted} --to merged"),
            ("rebuild and compare", f"fedmezo verify {quoted}"),
            ("go on", f"fedmezo {verb} {quoted} --rounds {2 * int(summary.get('rounds') or 0)}"),
        ]
        parts += [Text(f"\nFiles in {folder}"), _pairs(files, "  ")] if files else []
        parts += [Text("\nNext"), _pairs(tries, "  ")]
    return Group(*parts)


def _gains(judged: Mapping[str, Any]) -> RenderableType:
    start, end = judged.get("start") or {}, judged.get("end") or {}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("evaluation", "start", "end"):
        table.add_column(head, justify="left" if head == "evaluation" else "right", header_style="bold")
    for name, value in end.items():
        if isinstance(value, int | float) and name.rpartition("/")[2] not in _COUNTS:
            table.add_row(Text(_words(name)), number(start.get(name)), number(value))
    return table


def _costs(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    sent = summary.get("bytes") or {}
    yield "rounds x clients", f"{summary.get('rounds')} x {summary.get('clients')}"
    yield "trained numbers", count(summary.get("dim"))
    yield "rate, mu", f"{summary.get('rate') or math.nan:.3g}, {summary.get('mu') or math.nan:.3g}"
    each = f"{size(sent.get('up_per_client_round'))} up, {size(sent.get('down_per_client_round'))} down"
    yield "per client and round", each
    yield "traffic in all", f"{size(sent.get('up_total'))} up, {size(sent.get('down_total'))} down"
    if moved := summary.get("flower"):
        yield "of Flower's messages", f"{size(moved.get('up'))} up, {size(moved.get('down'))} down, framing and all"
    tokens = f" over {count(summary['tokens'])} tokens" if summary.get("tokens") else ""
    yield "work", f"{count(summary.get('forwards'))} forward passes{tokens}"
    megabytes = summary.get("peak_rss_mb")
    memory = f", {size(megabytes * 1e6)} of memory at most" if megabytes else ""
    yield "time", f"{duration(summary.get('seconds'))}{memory}"
    if summary.get("skipped_steps"):
        yield "skipped steps", f"{count(summary['skipped_steps'])} (a loss was not finite)"
    if private := summary.get("privacy"):
        yield "privacy", privacy_words(private)
    yield "digest", str(summary.get("digest") or "")[:16]


def facts_table(facts: Mapping[str, Any]) -> RenderableType:
    """Returns any result as a table: one row per value, nested names joined by dots, sentences below.

    Who has which labels ("split") is left to --json and the report: it has a number per client and label.
    """
    sentences = facts.get("advice") or ()
    sentences = [sentences] if isinstance(sentences, str) else sentences
    rows = list(_rows({name: value for name, value in facts.items() if name not in ("advice", "split")}))
    return Group(_pairs(rows), *(Text(f"- {sentence}") for sentence in sentences))


def _rows(facts: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        full = f"{path}{name}"
        if isinstance(value, Mapping):
            yield from _rows(value, f"{full}.")
        else:
            yield full.replace("_mb", "").replace("_", " "), _shown(full, value)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    for unit, text in _UNITS.items():
        if unit in name:
            return text(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
