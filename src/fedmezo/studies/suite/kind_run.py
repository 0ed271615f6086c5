"""A cell that is a whole run of a configuration: its evaluations with their cost, and what its journal tells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from fedmezo.runtime.journal import Journal
from fedmezo.runtime.records import Round
from fedmezo.studies.compare.curves import read_curve
from fedmezo.studies.config import Config, parse_config
from fedmezo.studies.files import JOURNAL
from fedmezo.studies.run import run
from fedmezo.studies.suite.kinds import Found, Settings

__all__ = ["config_of", "tune"]

_PLAIN = {"dir": None, "report": False, "tensorboard": False}
_WEIGHTS = "adapter/adapter_model.safetensors"


def config_of(settings: Settings, seed: int) -> Config:
    """Returns the configuration of a cell: its seed names data, split, batches and directions.

    A section `probe` is the kind's own, and is left out.
    """
    given = {name: dict(section) for name, section in settings.items() if name != "probe"}
    for section in ("federation", "data"):
        given[section] = {"seed": seed, **given.get(section, {})}
    given["output"] = {"export": False, **given.get("output", {}), **_PLAIN}
    return parse_config(given)


def tune(settings: Settings, seed: int) -> Found:
    """Returns the evaluations of a run, and of its journal: dim, mu, rates, update lengths, slopes, bytes, surges."""
    config = config_of(settings, seed)
    with TemporaryDirectory(prefix="fedmezo-study-") as place:
        folder = Path(place) / "run"
        summary = run(config, out=folder)
        points = [{**point.spent, **_metrics(point.metrics)} for point in read_curve(folder)]
        values: dict[str, Any] = {"dim": summary.dim, "mu": summary.mu, "rate": summary.rate, "digest": summary.digest}
        values |= {"up_per_client_round": summary.bytes["up_per_client_round"]}
        values |= {"down_per_client_round": summary.bytes["down_per_client_round"]}
        values |= {"skipped": summary.skipped_steps, "taken_back": summary.taken_back}
        values |= _of_journal(folder / JOURNAL, dim=summary.dim) | dict(_norms(folder / _WEIGHTS))
    return points, values


def _metrics(metrics: Any) -> dict[str, float]:
    """Returns the metrics of the common evaluation set, without those of single categories."""
    return {name: value for name, value in metrics.items() if "/" not in name and name not in ("tokens", "examples")}


def _of_journal(path: Path, *, dim: int) -> dict[str, float]:
    with Journal.open(path, readonly=True) as journal:
        rounds = list(journal.rounds())
    steps = [_update2(done, dim=dim) for done in rounds]
    slopes = [_slopes(done) for done in rounds]
    factors = [entry.task.rate for done in rounds for entry in done.entries]
    news = Counter(kind for done in rounds for kind, _ in done.news)
    return {
        "rate_low": min(factors),
        "rate_high": max(factors),
        "update2_first": steps[0],
        "update2_last": steps[-1],
        "slope_first": slopes[0],
        "slope_last": slopes[-1],
        "down_most": max(entry.bytes_down for done in rounds for entry in done.entries),
        **{f"events_{kind}": many for kind, many in news.items()},
    }


def _update2(done: Round, *, dim: int) -> float:
    """Returns the squared length of what a round adds: exact for dense updates of one client, else as if orthogonal.

    Two directions of d scalars are orthogonal up to 1 / sqrt(d), so the lengths add up.
    """
    from fedmezo.fl.walk import walk_of

    total = 0.0
    for entry in done.entries:
        if entry.reply.delta is not None:
            return math.nan
        walk = walk_of(entry.task, [0.0 if math.isnan(slope) else slope for slope in entry.reply.slopes])
        total += entry.weight**2 * math.fsum(c * c for c in walk.coefficients)
    return dim * total


def _slopes(done: Round) -> float:
    """Returns the root mean square of a round's slopes; nan without any."""
    seen = [slope for entry in done.entries for slope in entry.reply.slopes if math.isfinite(slope)]
    return math.sqrt(fmean(slope * slope for slope in seen)) if seen else math.nan


def _norms(path: Path) -> Iterator[tuple[str, float]]:
    """Yields the lengths of a written adapter's two halves; nothing without one."""
    if not path.exists():
        return
    from safetensors.torch import load_file

    squares = {"lora_A": 0.0, "lora_B": 0.0}
    for name, tensor in load_file(path).items():
        for half in squares:
            squares[half] += float(tensor.double().square().sum()) if half in name else 0.0
    yield from ((f"norm_{half}", math.sqrt(square)) for half, square in squares.items())
