"""Symptoms of where the loss goes: up, nowhere, or down."""

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from fedmezo.studies.doctor.finding import Finding
from fedmezo.studies.doctor.trend import Trend, levels, rise, trend
from fedmezo.studies.doctor.vitals import Pulse, Vitals
from fedmezo.studies.page import count, number

__all__ = ["course_of", "diverging", "growing_slopes", "improves", "lower_rate", "progress", "reach"]

_GROWN = 10.0  # as in fl/fedmezo.py: a diverging run shows slopes ten times larger within a few rounds
_CUT = (2.0, 10.0)
_VISIBLE = 0.01
_FEW = 8
MINUS = "\N{MINUS SIGN}"


def _growth(run: Vitals) -> tuple[float, int]:
    """Returns by how much the slopes are larger than in the first rounds at most, and the round where they are."""
    scales = [pulse.scale for pulse in run.pulses if pulse.scale > 0]
    if len(scales) < 4:
        return 1.0, 0
    seen = levels(scales)
    most = max(range(len(seen)), key=seen.__getitem__)
    return seen[most] / seen[0], most + len(scales) - len(seen)


def lower_rate(run: Vitals) -> float:
    """Returns the rate to start again with: at most a half and at least a tenth of the run's, by its slopes' growth.

    A step is as long as rate times slope, so a rate divided by the growth makes the last steps as long as the first.
    Where d is known it is at most 0.3 / sqrt(d).
    """
    least, most = _CUT
    lower = run.pulses[0].rate / min(max(_growth(run)[0], least), most)
    return min(lower, run.start_rate) if run.walks and run.dim else lower


def _tamer(run: Vitals) -> str:
    """Returns what to set so that a run does not diverge."""
    clip = " and algorithm.clip=3.0" if run.walks and run.setting("algorithm.clip") == "none" else ""
    return f"--set algorithm.rate={lower_rate(run):.2g}{clip}"


def diverging(run: Vitals) -> Iterator[Finding]:
    """Yields whether the run goes up, and what guards did about it.

    Up is any of: the median loss of the last rounds is above the lowest such median by more than scatter explains
    (`trend.rise`); the trend rises at 99.7 % and by 3 % of the loss; the last evaluation is 5 % worse than that of the
    untrained model. A surge that a guard caught and that is over is a warning: the run should have begun lower.
    """
    surges = [at for at, kind, _ in run.events if kind == "surge"]
    halved = [at for at, kind, _ in run.events if kind == "slow"]
    back = [at for at, kind, detail in run.events if kind == "rollback" and "surge" in detail]
    numbers: dict[str, Any] = {
        "surges": surges, "halvings": len(halved), "rollbacks": len(back), "slope_growth": _growth(run)[0],
    }  # fmt: skip
    said = list(_ups(run, numbers))
    if said:
        growth = numbers["slope_growth"]
        said += [f"slopes grew {growth:.2g}x"] if growth >= _CUT[0] else []
        text = " and ".join([", ".join(said[:-1]), said[-1]] if len(said) > 1 else said)
        sentence = f"{text[0].upper()}{text[1:]}{_guarded(halved, back)}."
        keep = _best_round(run, numbers)
        advice = f"Start again with {_tamer(run)}{', or take back the rounds since the best:' if keep else '.'}"
        command = f"fedmezo rollback {shlex.quote(str(run.folder))} --round {keep}" if keep else ""
        yield Finding("diverging", "problem", sentence, advice, command, numbers)
    elif surges or back:
        at = ", ".join(str(each + 1) for each in [*surges, *back])
        now = math.prod(float(detail) for _, kind, detail in run.events if kind == "slow")
        yield Finding(
            "surges",
            "warning",
            f"The training loss surged at round {at}, and has come down again{_guarded(halved, back)}.",
            f"Nothing now: the rate is {now:.2g} of what was asked for. Next time begin with {_tamer(run)}",
            numbers=numbers | {"slowed": now},
        )


def _ups(run: Vitals, numbers: dict[str, Any]) -> Iterator[str]:
    seen, course = rise([loss for _, loss in run.losses]), course_of(run)
    if seen is not None and seen.real:
        best, began = run.losses[seen.best][0], run.losses[seen.began][0]
        numbers |= {"lowest": seen.floor, "last": seen.last, "best_round": best, "began_round": began}
        yield (
            f"the training loss rises since round {began + 1}: it was {number(seen.floor)} around round {best + 1}, "
            f"now {number(seen.last)}"
        )
    elif course is not None and course.climbs and course.slope * course.rounds > 0.03 * abs(run.losses[0][1]):
        numbers |= {"per_round": course.slope, "low": course.low, "high": course.high}
        yield f"the training loss rises by {_trend(course)}"
    if run.worse_than_untrained:
        (_, start), (_, last) = run.judged[0], run.judged[-1]
        # The first evaluation after which none was as good as the untrained model's.
        since = next(at for place, (at, _) in enumerate(run.judged) if place and _all_above(run, place))
        numbers |= {"evaluation_start": start, "evaluation_last": last, "worse_since": since}
        ends = f"evaluation loss {number(start)}, now {number(last)}"
        yield f"the model is worse than untrained since round {since} ({ends})"


def _all_above(run: Vitals, place: int) -> bool:
    return all(loss > run.judged[0][1] for _, loss in run.judged[place:])


def _best_round(run: Vitals, numbers: Mapping[str, Any]) -> int:
    """Returns after how many rounds the model was best; 0 when it was never better than untrained."""
    if len(run.judged) > 1:
        return min(run.judged, key=lambda item: item[1])[0]
    return int(numbers.get("best_round", 0))


def _guarded(halved: list[int], back: list[int]) -> str:
    said = [f"lowered the rate {len(halved)}x"] if halved else []
    said += [f"rolled back {len(back)}x"] if back else []
    return f" (the guard {' and '.join(said)})" if said else ""


def growing_slopes(run: Vitals) -> Iterator[Finding]:
    """Yields whether slopes have grown tenfold: what comes before a surge."""
    growth, at = _growth(run)
    if growth >= _GROWN:
        yield Finding(
            "growing-slopes",
            "warning",
            f"Slopes have grown {growth:.2g}x since the first rounds (largest around round {at + 1}), so steps have, "
            "too; a surge often follows.",
            f"Watch it; if the loss turns, start again with {_tamer(run)}",
            numbers={"slope_growth": growth, "round": at},
        )


def course_of(run: Vitals, *, last: int | None = None) -> Trend | None:
    """Returns the trend of the clients' losses over all rounds, or over the `last` ones."""
    first = 0 if last is None else len(run.pulses) - last
    return trend({
        client: [(at, visit.loss) for at, visit in visits if at >= first and math.isfinite(visit.loss)]
        for client, visits in run.clients.items()
    })  # fmt: skip


def improves(run: Vitals) -> bool:
    """Returns whether the run gets better: the trend falls, or the last evaluation is 2 % better than the first."""
    course = course_of(run)
    judged = len(run.judged) > 1 and run.judged[-1][1] < run.judged[0][1] - 0.02 * abs(run.judged[0][1])
    return judged or (course is not None and course.high < 0)


def progress(run: Vitals) -> Iterator[Finding]:
    """Yields the trend of the training loss: falling, turned or level at last, or not to be told from no change.

    Below eight rounds nothing is said. Turned: the second half rises at 99.7 %. Level: it is slower than the whole at
    95 %, and not to be told from no change.
    """
    found, late = course_of(run), course_of(run, last=len(run.pulses) // 2)
    if len(run.losses) < _FEW or found is None:
        return
    if found.high >= 0:
        yield _unseen(run, found)
        return
    numbers = {"per_round": found.slope, "low": found.low, "high": found.high, "noise": found.noise}
    yield Finding("falling", "good", f"The training loss falls by {_trend(found)}.", numbers=numbers)
    half = len(run.pulses) // 2
    if late is None:
        return
    seen = {"rounds": half, "per_round": late.slope, "low": late.low, "high": late.high}
    if late.climbs:
        sentence = f"Over the last {half} rounds the training loss rises again, by {_trend(late)}."
        advice = f"Stop early, let the rate fall (algorithm.decay=linear), or start again with {_tamer(run)}"
        yield Finding("turned", "warning", sentence, advice, numbers=seen)
    elif found.slope < late.low <= 0 <= late.high:
        sentence = f"Over the last {half} rounds it hardly changes any more: {_trend(late, sign=True)}."
        advice = "It may have learnt what it can; if not, a larger federation.cohort or algorithm.decay=linear helps."
        yield Finding("level", "note", sentence, advice, numbers=seen)


def _trend(course: Trend, *, sign: bool = False) -> str:
    """Returns a trend with its interval; the direction is in the words around it unless `sign`."""
    flip = 1 if sign or course.slope >= 0 else -1
    ends = sorted((flip * course.low, flip * course.high))
    each = _signed(course.slope) if sign else number(abs(course.slope), 2)
    show = _signed if sign else lambda value: number(value, 2)
    return f"{each} nats a round (95 %: {show(ends[0])} to {show(ends[1])})"


def _signed(value: float) -> str:
    return f"{MINUS if value < 0 else '+'}{number(abs(value), 2)}"


def _unseen(run: Vitals, found: Trend) -> Finding:
    """Returns that the trend is hidden by the scatter of batches, and what would show it.

    Four times the batch halves the scatter, four times the cohort quarters the squared error: both act on n^3, so
    either needs 0.63 of the rounds. Where the evaluation tells that the run learns, it is a note.
    """
    well, size = improves(run), int(run.setting("federation.batch_size", 1))
    numbers = {"per_round": found.slope, "low": found.low, "high": found.high, "noise": found.noise}
    wanted = found.rounds_to_see(slope=found.slope) if found.slope < 0 else math.inf
    more = max(wanted - found.rounds, 1)
    sentence = (
        f"The training loss shows no trend in {found.rounds} rounds, {_trend(found, sign=True)}: a client's loss "
        f"scatters by {number(found.noise, 2)} from batch to batch."
    )
    later = (
        f"At this pace it shows after about {count(more)} more round{'s' if more >= 1.5 else ''}"
        if more <= 10 * found.rounds
        else f"So many rounds show only what is over {number(found.half * found.rounds, 2)} nats in all"
    )
    advice = (
        f"{later}. federation.batch_size={4 * size} halves the scatter (0.63 of the rounds), and so do four "
        "times the clients a round; algorithm.directions=4 halves the noise of each step."
    )
    told = "The evaluation tells more: it fell." if well else advice + _bolder(run)
    return Finding("unseen", "note" if well else "warning", sentence, told, numbers=numbers | {"rounds_needed": wanted})


def _bolder(run: Vitals) -> str:
    slow = run.walks and run.dim and run.pulses[-1].rate < 0.5 * run.start_rate
    return f" First try algorithm.rate={run.start_rate:.2g}, which is 0.3/sqrt(d)." if slow else ""


def reach(run: Vitals) -> Iterator[Finding]:
    """Yields whether the whole run can lower the loss by 1 % at all.

    The ceiling of a round is the weighted mean over its clients of rate * sum of slope^2, an upper bound to first order
    (`vitals._ceiling`). If the ceilings of all planned rounds are under 1 % of the loss, the rate is too small,
    whatever else is right or wrong. Growing slopes would lift it, so what is said holds for slopes as they are.
    """
    ceilings = [sum(visit.weight * visit.ceiling for visit in pulse.visits) for pulse in run.pulses]
    known = [ceiling for ceiling in ceilings if math.isfinite(ceiling)]
    if not run.walks or len(known) < 3 or not run.losses or not any(pulse.rate for pulse in run.pulses):
        return
    start = abs(run.losses[0][1])
    whole = sum(known) / len(known) * run.planned
    if not 0 < whole < _VISIBLE * start:
        return
    factor = _VISIBLE * start / whole
    rate = _latest_rate(run.pulses) * factor
    capped = f'; 0.3/sqrt(d) = {run.start_rate:.2g} is where "auto" starts' if run.dim else ""
    yield Finding(
        "out-of-reach",
        "problem",
        f"The rate is too small: at these slopes all {run.planned} rounds together lower the loss by at most "
        f"{number(whole, 2)} of {number(start)} nats.",
        f"Raise algorithm.rate at least {factor:,.2g}x, to {rate:.2g}, or take as many times more steps{capped}.",
        numbers={"ceiling": whole, "loss": start, "factor": factor, "rate": rate},
    )


def _latest_rate(pulses: tuple[Pulse, ...]) -> float:
    return next((pulse.rate for pulse in reversed(pulses) if pulse.rate), 0.0)
