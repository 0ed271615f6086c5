"""Who looks on while a run goes: nobody, a tracker of curves such as TensorBoard, or several at once.

A watcher has four methods: `start(info)`, `round(report)`, `note(text)` and `finish(summary)`. It only looks: nothing
it does can change the run. A tracker needs one, `log(metrics, step)`; `TrackerWatch` makes a watcher of it.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from fedmezo.errors import missing

if TYPE_CHECKING:
    from fedmezo.runtime.progress import RoundReport

__all__ = ["NullWatch", "TensorBoard", "TensorBoardWatch", "Tracker", "TrackerWatch", "Watch", "Watchers"]

MOST_CURVES = 50  # clients of a round with a curve of their own


class Watch(Protocol):
    """What a run tells whoever looks on."""

    def start(self, info: Mapping[str, object]) -> None:
        """Takes what is known before the first round."""

    def round(self, report: "RoundReport") -> None:
        """Takes one finished round."""

    def note(self, text: str) -> None:
        """Takes one sentence about the run."""

    def finish(self, summary: Mapping[str, object]) -> None:
        """Takes the summary of the run; nothing follows it."""


class NullWatch:
    """A watcher that does nothing."""

    def start(self, info: Mapping[str, object]) -> None:
        """Does nothing."""

    def round(self, report: "RoundReport") -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""

    def finish(self, summary: Mapping[str, object]) -> None:
        """Does nothing."""


class Watchers:
    """Several watchers as one; each is told in the order given."""

    def __init__(self, watchers: Sequence[Watch]) -> None:
        """Takes the watchers."""
        self.watchers = tuple(watchers)

    def start(self, info: Mapping[str, object]) -> None:
        """Passes `info` on."""
        for watcher in self.watchers:
            watcher.start(info)

    def round(self, report: "RoundReport") -> None:
        """Passes `report` on."""
        for watcher in self.watchers:
            watcher.round(report)

    def note(self, text: str) -> None:
        """Passes `text` on."""
        for watcher in self.watchers:
            watcher.note(text)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Passes `summary` on."""
        for watcher in self.watchers:
            watcher.finish(summary)


class Tracker(Protocol):
    """Where the curves of a run go: TensorBoard, Weights & Biases, or an object of your own.

    `log` is all it must have. What it has of `start(info)`, `text(tag, text, step)` and `finish()` is called too.
    """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Takes the numbers of one round, all finite.

        Args:
          metrics: name -> value, such as "train/loss" and "eval/eval/accuracy".
          step: rounds done. It goes up by one; where rounds were taken back it comes again, and its new numbers hold.
        """


class TrackerWatch:
    """Tells a tracker of a run. A tracker that raises is told of nothing more, and `say` hears why."""

    def __init__(self, tracker: Tracker, *, say: Callable[[str], None] = lambda _: None) -> None:
        """Takes the tracker."""
        self._tracker: Any = tracker
        self._say = say
        self._done = 0

    def start(self, info: Mapping[str, object]) -> None:
        """Passes on what is known before the first round; `done` in it is the number of rounds a resumed run has."""
        done = info.get("done", 0)
        self._done = done if isinstance(done, int) else 0
        self._tell("start", info)
        self._text("run", _as_code(info))

    def round(self, report: "RoundReport") -> None:
        """Passes one round on."""
        self._done = report.round + 1
        finite = {name: value for name, value in _curves(report).items() if math.isfinite(value)}
        self._tell("log", finite, step=self._done)
        for kind, detail in report.events:
            self._text(f"events/{kind}", detail)

    def note(self, text: str) -> None:
        """Passes one sentence on."""
        self._text("notes", text)

    def finish(self, summary: Mapping[str, object]) -> None:
        """Passes the summary on, and the end."""
        self._text("summary", _as_code(summary))
        self._tell("finish")

    def _text(self, tag: str, text: str) -> None:
        self._tell("text", tag, text, step=self._done)

    def _tell(self, what: str, *told: object, **more: object) -> None:
        method = getattr(self._tracker, what, None)
        try:
            if method is not None:
                method(*told, **more)
        except Exception as error:  # it is somebody else's program, and the run is worth more than its curves
            name, self._tracker = type(self._tracker).__name__, None
            self._say(f"{name} fails ({type(error).__name__}: {error}); this run is not logged there any more.")


class TensorBoard:
    """A tracker that writes event files for TensorBoard.

    A file is opened with the first round, and again when rounds were taken back, so that it hides what older ones say
    of the rounds done again.

    Raises:
      ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        """Takes the folder of the event files; it is made when needed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise missing("output.tensorboard needs tensorboard", extra="report") from error
        self._open: Callable[[int], Any] = lambda step: SummaryWriter(log_dir=str(folder), purge_step=step)  # type: ignore[no-untyped-call]
        self._writer: Any = None
        self._texts: list[tuple[str, str, int]] = []
        self._last = 0

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Writes the numbers of one round."""
        if self._writer is not None and step <= self._last:
            self.finish()
        self._last = step
        writer = self._ready(step)
        for name, value in metrics.items():
            writer.add_scalar(name, value, global_step=step)
        writer.flush()

    def text(self, tag: str, text: str, step: int) -> None:
        """Writes a text, or keeps it until the first round."""
        self._texts.append((tag, text, step))
        if self._writer is not None:
            self._ready(step + 1)

    def finish(self) -> None:
        """Closes the file; a run may go on afterwards in a new one."""
        last = self._texts[-1][2] if self._texts else self._last
        self._ready(last + 1).close()
        self._writer = None

    def _ready(self, first: int) -> Any:
        """Returns the open writer, with every text that was waiting written; a new file holds steps from `first` on."""
        if self._writer is None:
            self._writer = self._open(first)
        for tag, text, step in self._texts:
            self._writer.add_text(tag, text, global_step=step)
        self._texts.clear()
        return self._writer


class TensorBoardWatch(TrackerWatch):
    """Writes the curves of a run for TensorBoard; a curve's step is the number of rounds done.

    A number that is not finite is left out. Of a cohort of more than 50 the lowest, the median and the highest loss are
    drawn.

    Raises:
      ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: Path | str, *, say: Callable[[str], None] = lambda _: None) -> None:
        """Takes the folder of the event files; it is made when needed."""
        super().__init__(TensorBoard(folder), say=say)


def _curves(report: "RoundReport") -> dict[str, float]:
    """Returns the value of every curve after one round."""
    found = {
        "train/loss": report.loss,
        "train/rate": report.rate,
        "train/skipped": float(report.skipped),
        "bytes/up": float(report.bytes_up),
        "bytes/down": float(report.bytes_down),
        "speed/forwards_per_second": report.forwards / report.seconds if report.seconds > 0 else math.nan,
        "speed/tokens_per_second": report.tokens / report.seconds if report.seconds > 0 else math.nan,
        "train/clip": report.clip if report.clip > 0 else math.nan,
    }
    losses = {client: values.get("loss", math.nan) for client, values in report.clients.items()}
    found |= {f"clients/{name}/loss": loss for name, loss in _few(losses).items()}
    for split, metrics in report.evaluations.items():
        found |= {f"eval/{split}/{name}": value for name, value in metrics.items()}
    return found


def _few(losses: Mapping[int, float]) -> Mapping[object, float]:
    """Returns the losses by client; lowest, median and highest instead when nobody could tell the curves apart."""
    finite = sorted(filter(math.isfinite, losses.values()))
    if len(losses) <= MOST_CURVES or not finite:
        return losses
    return {"lowest": finite[0], "median": median(finite), "highest": finite[-1]}


def _as_code(values: Mapping[str, object]) -> str:
    """Returns the values as indented JSON in a Markdown code block, which is how TensorBoard shows text."""
    lines = json.dumps(dict(values), indent=2, default=str).splitlines()
    return "\n".join("    " + line for line in lines)
