"""What the rows of a comparison say, in sentences, and no more than they say.

Two arms are told apart by the differences between their runs with the same seed: when the 95 % t interval of the mean
difference contains 0, or there are fewer than three seeds, neither is called better.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import NormalDist, fmean, stdev
from typing import Any

from fedmezo.studies.compare.rows import COLUMNS, MEASURES, Measure, Row
from fedmezo.studies.page import number

__all__ = ["FEWEST_SEEDS", "paired_interval", "t_limit", "verdicts"]

Entry = dict[str, Any]
FEWEST_SEEDS = 3
_RANKED = (
    "loss",
    "accuracy",
    "token_accuracy",
    "rouge_l",
    "exact_match",
    "peak_rss_mb",
    "bytes",
    "seconds",
)
# The 97.5 % points of Student's t; from 11 degrees of freedom on the series below is good to 5e-4.
_T975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)
_FEW = {1: "one seed only", 2: "two seeds only"}
_TIMES = 2.0  # from here on a ratio says more than a difference


def t_limit(freedom: int) -> float:
    """Returns the 97.5 % point of Student's t distribution with so many degrees of freedom, at least 1."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    # Cornish-Fisher expansion of the quantile in 1 / freedom.
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def paired_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Returns the mean of the differences and its 95 % t interval; it has no width when all are alike.

    One difference gives an interval from minus infinity to infinity.
    """
    mean = fmean(differences)
    if len(differences) < 2:
        return mean, -math.inf, math.inf
    half = t_limit(len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half


def verdicts(rows: Sequence[Row], *, budget: str) -> list[Entry]:
    """Returns what can be said of each column and measure, best arm against the runner-up.

    Args:
      rows: the reported runs.
      budget: what the budget counts; nobody is ranked by that.

    Returns:
      Per sentence: column, measure, text, best, runner_up, difference (of the runner-up to the best, never negative),
      interval, seeds (shared by the two), alike (arms with the very numbers of the best), separated.
    """
    found: list[Entry] = []
    for column in COLUMNS:
        listed = [row for row in rows if row["column"] == column]
        found += _failures(listed, column)
        for measure in MEASURES:
            if measure.name in _RANKED and measure.name != budget:
                found += _verdict(listed, measure, column=column)
    return [*_by_rates(found), *found]


def _failures(rows: Sequence[Row], column: str) -> Iterator[Entry]:
    arms = dict.fromkeys(row["arm"] for row in rows)
    for arm in arms:
        failed = {row["seed"]: row["error"] for row in rows if row["arm"] == arm and row["error"] is not None}
        many = sum(row["arm"] == arm for row in rows)
        if failed:
            seeds = ", ".join(map(str, failed))
            text = (
                f"{arm} failed in {len(failed)} of {many} runs (seed {seeds}), which are left out of all its numbers: "
                f"{next(iter(failed.values()))}."
            )
            yield _entry(column, "runs", text.replace("..", "."))


def _entry(column: str, measure: str, text: str, **more: Any) -> Entry:
    nothing = dict.fromkeys(("best", "runner_up", "difference", "interval", "separated"))
    return {"column": column, "measure": measure, "text": text, "seeds": [], "alike": [], **nothing, **more}


def _verdict(rows: Sequence[Row], measure: Measure, *, column: str) -> Iterator[Entry]:
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        if row[measure.name] is not None:  # it is None for every run that failed
            values.setdefault(row["arm"], {})[row["seed"]] = row[measure.name]
    if len(values) < 2:
        return
    sign = 1 if measure.better == "lower" else -1
    best, *others = sorted(values, key=lambda arm: sign * fmean(values[arm].values()))
    alike = [arm for arm in others if values[arm] == values[best]]
    if len(alike) == len(others):
        yield _all_alike(measure, best, values, column=column)
        return
    second = next(arm for arm in others if arm not in alike)
    seeds = sorted(values[best].keys() & values[second].keys())
    if not seeds:
        yield _entry(column, measure.name, f"{measure.title}: {best} and {second} share no seed, so nothing is said.")
        return
    differences = [sign * (values[second][seed] - values[best][seed]) for seed in seeds]
    if not alike and fmean(differences) < 0:  # over the seeds they share, the order is the other one
        best, second, differences = second, best, [-difference for difference in differences]
    means = fmean(values[best][seed] for seed in seeds), fmean(values[second][seed] for seed in seeds)
    difference, low, high = paired_interval(differences)
    separated = len(seeds) >= FEWEST_SEEDS and low > 0
    told = _sentence(
        measure, (_joined([best, *alike]), second), means, interval=(difference, low, high), seeds=len(seeds)
    )
    last = others[-1] if others[-1] not in (best, second, *alike) else None
    yield _entry(
        column,
        measure.name,
        told + (_behind(measure, values[best], values[last], names=(best, last)) if last else ""),
        best=best if separated else None,
        alike=alike,
        runner_up=second if separated else None,
        difference=difference,
        interval=[low, high] if math.isfinite(low) else None,
        seeds=seeds,
        separated=separated,
    )


def _sentence(
    measure: Measure,
    arms: tuple[str, str],
    means: tuple[float, float],
    *,
    interval: tuple[float, float, float],
    seeds: int,
) -> str:
    difference, low, high = interval
    each = [f"{arm} {measure.text(mean)}" for arm, mean in zip(arms, means, strict=True)]
    if seeds < FEWEST_SEEDS:
        return f"{measure.title}: {_FEW[seeds]}, so nothing is ranked; {each[0]}, {each[1]}."
    alike = f"the same in all {seeds} seeds"
    told = alike if low == high else f"95 % interval of the difference {_range(measure, low, high)}, {seeds} seeds"
    if low <= 0:
        return f"{measure.title}: not separated; {each[0]}, {each[1]} ({told})."
    small, large = sorted(means)
    times = f" ({number(large / small, 3)} times)" if small > 0 and large / small >= _TIMES else ""
    return f"{measure.title}: {each[0]}, {measure.gap(difference)} {measure.better} than {each[1]}{times}; {told}."


def _behind(measure: Measure, first: Mapping[int, float], last: Mapping[int, float], *, names: tuple[str, str]) -> str:
    """Returns a sentence on the last of three or more arms, if it is clearly behind the first."""
    seeds = sorted(first.keys() & last.keys())
    sign = 1 if measure.better == "lower" else -1
    if len(seeds) < FEWEST_SEEDS:
        return ""
    difference, low, _ = paired_interval([sign * (last[seed] - first[seed]) for seed in seeds])
    worse = "higher" if measure.better == "lower" else "lower"
    mean = measure.text(fmean(last[seed] for seed in seeds))
    return f" Last: {names[1]} {mean}, {measure.gap(difference)} {worse} than {names[0]}." if low > 0 else ""


def _all_alike(measure: Measure, best: str, values: Mapping[str, Mapping[int, float]], *, column: str) -> Entry:
    seeds, mean = sorted(values[best]), fmean(values[best].values())
    many = f"{len(seeds)} seeds" if len(seeds) > 1 else _FEW[1]
    text = f"{measure.title}: {measure.text(mean)} for {_joined(list(values))} alike, {many}."
    alike = [arm for arm in values if arm != best]
    return _entry(column, measure.name, text, seeds=seeds, alike=alike, difference=0.0, separated=False)


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def _range(measure: Measure, low: float, high: float) -> str:
    """Returns "low to high" with the unit once, when both have the same."""
    texts = [measure.gap(low), measure.gap(high)]
    units = {text.partition(" ")[2] for text in texts}
    first = texts[0].partition(" ")[0] if len(units) == 1 else texts[0]
    return f"{first} to {texts[1]}".replace("-", "\N{MINUS SIGN}")


def _by_rates(found: Sequence[Entry]) -> Iterator[Entry]:
    """Yields whether the choice of the rates decides who has the lowest loss (E20 of the paper's errata)."""
    best = {entry["column"]: entry["best"] for entry in found if entry["measure"] == "loss"}
    equal, tuned = best.get("equal"), best.get("tuned")
    if "equal" not in best or "tuned" not in best:
        return
    first = f"{equal} has the lowest final loss" if equal else "no arm is separated from the next"
    then = f"{tuned} has it" if equal and tuned else f"{tuned} has the lowest" if tuned else "none is separated"
    same = "; the order does not hang on the rates" if equal and equal == tuned else ""
    yield _entry("both", "loss", f"At one equal rate {first}; with rates tuned alike {then}{same}.", best=tuned)
