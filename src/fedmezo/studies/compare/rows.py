"""The numbers of a comparison: one row per run, and what the runs of an arm come to over its seeds."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from fedmezo.studies.compare.runs import Outcome
from fedmezo.studies.page import DASH, count, duration, number, percent, size

__all__ = [
    "COLUMNS",
    "MEASURES",
    "Measure",
    "Row",
    "aggregate",
    "measured",
    "points",
    "row_of",
    "spread_text",
]

Row = Mapping[str, Any]
COLUMNS = {"configured": "as configured", "equal": "equal rate", "tuned": "tuned rates"}


def rate_text(value: float | None) -> str:
    """Returns a rate with three digits."""
    return DASH if value is None else f"{value:.3g}"


def points(value: float | None) -> str:
    """Returns a difference of shares, in points."""
    return f"{number(100 * value, 3)} points" if value is not None and math.isfinite(value) else DASH


def _short(value: float | None) -> str:
    return number(value, 3)


def _megabytes(value: float | None) -> str:
    return size(None if value is None else value * 1e6)


@dataclass(frozen=True)
class Measure:
    """One thing measured of every run.

    Attributes:
      name: its key in a row.
      title: its name for people.
      text: a value with its unit.
      gap: a difference with its unit.
      better: "lower" or "higher" is better; "" where neither is.
      cost: whether it is a price and not a result.
    """

    name: str
    title: str
    text: Callable[[float | None], str]
    gap: Callable[[float | None], str]
    better: str = ""
    cost: bool = False


MEASURES = (
    Measure("loss", "Final loss", number, _short, "lower"),
    Measure("accuracy", "Answers right", percent, points, "higher"),
    Measure("token_accuracy", "Answer tokens right", percent, points, "higher"),
    Measure("rouge_l", "Rouge-L", number, _short, "higher"),
    Measure("exact_match", "Written answers right", percent, points, "higher"),
    Measure("peak_rss_mb", "Peak memory", _megabytes, _megabytes, "lower", cost=True),
    Measure("bytes", "Bytes both ways", size, size, "lower", cost=True),
    Measure("bytes_up", "Sent up", size, size, cost=True),
    Measure("bytes_down", "Sent down", size, size, cost=True),
    Measure("bytes_up_per_client_round", "Up/client/round", size, size, cost=True),
    Measure("bytes_down_per_client_round", "Down/client/round", size, size, cost=True),
    Measure("rounds", "Rounds", count, count, cost=True),
    Measure("forwards", "Forward passes", count, count, cost=True),
    Measure("tokens", "Tokens", count, count, cost=True),
    Measure("seconds", "Training time", duration, duration, "lower", cost=True),
)


def row_of(outcome: Outcome) -> Row:
    """Returns one run as a row; what was not measured is None, and everything is when the run failed."""
    job, summary = outcome.job, {} if outcome.error else outcome.summary
    judged = summary.get("eval") or {}
    sent = summary.get("bytes") or {}
    end = judged.get("end") or {}
    up, down = sent.get("up_total"), sent.get("down_total")
    values = {
        **{name: end.get(name) for name in ("loss", "accuracy", "token_accuracy", "rouge_l", "exact_match")},
        "start_loss": (judged.get("start") or {}).get("loss"),
        "bytes": None if up is None or down is None else up + down,
        "bytes_up": up,
        "bytes_down": down,
        "bytes_up_per_client_round": sent.get("up_per_client_round"),
        "bytes_down_per_client_round": sent.get("down_per_client_round"),
        **{name: summary.get(name) for name in ("peak_rss_mb", "rounds", "forwards", "tokens", "seconds")},
    }
    return {
        "arm": job.arm,
        "algorithm": job.config.algorithm.name,
        "column": job.column,
        "seed": job.seed,
        "rate": summary.get("rate") or job.config.algorithm.rate,
        **values,
        "skipped_steps": summary.get("skipped_steps"),
        "digest": summary.get("digest"),
        "run_dir": str(job.folder),
        "error": outcome.error or None,
    }


def measured(rows: Sequence[Row]) -> list[Measure]:
    """Returns the measures that any of the rows has a value for."""
    return [measure for measure in MEASURES if any(row[measure.name] is not None for row in rows)]


def aggregate(rows: Sequence[Row]) -> list[Row]:
    """Returns one entry per arm and column: mean, sd, min and max of every measure over the seeds that did not fail."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["column"]), []).append(row)
    return [_summed(listed) for listed in groups.values()]


def _summed(rows: Sequence[Row]) -> Row:
    good = [row for row in rows if row["error"] is None]
    first = (good or rows)[0]
    return {
        **{name: first[name] for name in ("arm", "algorithm", "column", "rate")},
        "seeds": [row["seed"] for row in good],
        "failed": {str(row["seed"]): row["error"] for row in rows if row["error"] is not None},
        **{measure.name: _spread([row[measure.name] for row in good]) for measure in MEASURES},
    }


def _spread(values: Sequence[float | None]) -> Row | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    sd = stdev(known) if len(known) > 1 else None
    return {"mean": fmean(known), "sd": sd, "min": min(known), "max": max(known), "n": len(known)}


def spread_text(found: Row | None, measure: Measure) -> str:
    """Returns "mean ± standard deviation unit"; the mean alone when the seeds agree or there is one."""
    if found is None:
        return DASH
    mean, sd = measure.text(found["mean"]), found["sd"]
    if not sd or measure.text(found["mean"] + sd) == mean:
        return mean
    amount, unit = _parts(mean)
    if amount is None or not found["mean"]:
        return f"{mean} ± {measure.text(sd)}"
    # In the unit of the mean: 455 ± 0.66 MB reads better than 455 MB ± 660 kB.
    spread = number(sd * float(amount.replace(",", "")) / found["mean"], 2)
    return f"{amount} ± {spread}{unit}"


def _parts(text: str) -> tuple[str | None, str]:
    """Returns a text as its one number and the unit behind it; None for the number of "2 min 5 s" and of a dash."""
    match = re.fullmatch(r"(-?[\d.,]+(?:e-?\d+)?)([^\d]*)", text)
    return (match[1], match[2]) if match else (None, "")
