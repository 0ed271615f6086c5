"""Who looks on while a run goes: nobody, TensorBoard, or several at once.

A watcher has four methods: `start(info)`, `round(report)`, `note(text)` and `finish(summary)`. It only looks: nothing
it does can change the run.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from fedmezo.errors import ConfigError

if TYPE_CHECKING:
    from fedmezo.runtime.progress import RoundReport

__all__ = ["NullWatch", "TensorBoardWatch", "Watch", "Watchers"]

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


class TensorBoardWatch:
    """Writes the curves of a run for TensorBoard; a curve's step is the number of rounds done.

    The event file is opened with the first round, so that a run that was resumed or rolled back hides what an older
    file says of the rounds done again. A number that is not finite is left out. Of a cohort of more than 50 the lowest,
    the median and the highest loss are drawn.

    Raises:
      ConfigError: tensorboard is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        """Takes the folder of the event files; it is made when needed."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "output.tensorboard needs tensorboard, which is not installed; run: pip install fedmezo[report]"
            ) from error
        self._open: Callable[[int], Any] = lambda step: SummaryWriter(log_dir=str(folder), purge_step=step)  # type: ignore[no-untyped-call]
        self._writer: Any = None
        self._texts: list[tuple[str, str]] = []
        self._done = 0

    def start(self, info: Mapping[str, object]) -> None:
        """Keeps `info`; it is written with the first round. `done` in it is the number of rounds a resumed run has."""
        done = info.get("done", 0)
        self._done = done if isinstance(done, int) else 0
        self._texts.append(("run", _as_code(info)))

    def round(self, report: "RoundReport") -> None:
        """Writes one round."""
        self._done = report.round
        writer = self._ready()
        self._done += 1
        for name, value in _curves(report).items():
            if math.isfinite(value):
                writer.add_scalar(name, value, global_step=self._done)
        for kind, detail in report.events:
            writer.add_text(f"events/{kind}", detail, global_step=self._done)
        writer.flush()

    def note(self, text: str) -> None:
        """Writes one sentence, or keeps it until the first round."""
        self._texts.append(("notes", text))
        if self._writer is not None:
            self._ready()

    def finish(self, summary: Mapping[str, object]) -> None:
        """Writes the summary and closes the file; a run may go on afterwards in a new file."""
        self._texts.append(("summary", _as_code(summary)))
        self._ready().close()
        self._writer = None

    def _ready(self) -> Any:
        """Returns the open writer, with every text that was waiting written."""
        if self._writer is None:
            self._writer = self._open(self._done + 1)
        for tag, text in self._texts:
            self._writer.add_text(tag, text, global_step=self._done)
        self._texts.clear()
        return self._writer


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
