"""What is worth telling of a round, apart from its numbers: (kind, detail)."""

from collections.abc import Iterator, Sequence

from fedmezo.fl.algorithm import Task
from fedmezo.runtime.records import SUMMED, Entry
from fedmezo.runtime.walkers import Walked

__all__ = ["absences", "oddities", "sums_of"]


def absences(walked: Sequence[Walked]) -> Iterator[tuple[str, str]]:
    """Yields "absent" for each client that was asked and is not in the round, "stale" for answers too late."""
    for absence in (absence for one in walked for absence in one.absent):
        yield ("stale" if absence.kind == "stale" else "absent"), absence.text


def sums_of(tasks: Sequence[Task], walked: Sequence[Walked]) -> Iterator[tuple[str, str]]:
    """Yields for each sum of walks whose they are, of those who were asked."""
    for one in walked:
        away = {absence.client for absence in one.absent if absence.kind != "stale"}
        if one.tasks:
            yield SUMMED, "clients " + ", ".join(str(task.client) for task in tasks if task.client not in away)


def oddities(entries: Sequence[Entry]) -> Iterator[tuple[str, str]]:
    """Yields what no healthy round has: "skipped" directions, "zero-slope", "zero-rate"."""
    entries = [entry for entry in entries if entry.walks] or entries
    skipped = sum(entry.reply.skipped for entry in entries)
    if skipped:
        yield "skipped", f"{skipped} directions skipped: a loss was not finite; lower rate or mu, or use float32"
    slopes = [slope for entry in entries for slope in entry.reply.slopes]
    if slopes and not any(slopes):
        yield "zero-slope", "every slope was 0: the loss does not depend on the trained parameters, or mu is too small"
    if all(entry.task.rate == 0 for entry in entries):
        yield "zero-rate", "the learning rate was 0 for every client"
