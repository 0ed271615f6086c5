"""Symptoms around the descent: how it is judged, what travels, how long it takes, whether the journal is whole."""

import shlex
from collections.abc import Iterator
from statistics import median

from fedmezo import __version__
from fedmezo.studies.doctor.course import MINUS, course_of
from fedmezo.studies.doctor.finding import Finding, Severity
from fedmezo.studies.doctor.vitals import Vitals
from fedmezo.studies.page import duration, number, size
from fedmezo.zo.noise import NOISE_VERSION

__all__ = ["health", "judging", "tempo", "traffic"]


def judging(run: Vitals) -> Iterator[Finding]:
    """Yields how the evaluation goes, beside the training loss.

    The same examples are judged each time, so differences are the model's, not the draw's. More than 1 % above the best
    is a note, as is a change below 1 %; a warning when it is over 2 % and over a quarter of what was gained;
    overfitting when, besides, at least two evaluations followed the best one and the training loss fell meanwhile.
    """
    seen = run.judged
    if not any(at > 0 for at, _ in seen):
        yield Finding(
            "not-judged",
            "warning" if run.finished else "note",
            f"The model has not been judged since the start: no evaluation in {len(run.pulses)} rounds.",
            f"It is due every {run.setting('eval.every', 5)} rounds (eval.every); `fedmezo eval` judges it now.",
        )
        return
    (_, start), (_, last) = seen[0], seen[-1]
    best_at, best = min(seen, key=lambda item: item[1])
    numbers = {"start": start, "best": best, "best_round": best_at, "last": last}
    above = last - best
    if above > 0.01 * abs(best):
        yield _worse(run, numbers, grave=above > max(0.02 * abs(best), 0.25 * (start - best)))
        return
    moved = f"from {number(start)} to {number(last)} ({(last - start) / abs(start):+.2%})".replace("-", MINUS)
    if last < start - 0.01 * abs(start):
        yield Finding("judged", "good", f"The evaluation loss fell {moved}.", numbers=numbers)
    else:
        yield Finding("judged", "note", f"The evaluation loss has hardly moved: {moved}.", numbers=numbers)


def _worse(run: Vitals, numbers: dict[str, float], *, grave: bool) -> Finding:
    at = int(numbers["best_round"])
    since = [round_number for round_number, _ in run.judged if round_number > at]
    course = course_of(run, last=len(run.pulses) - at)
    overfits = grave and len(since) > 1 and course is not None and course.high < 0
    best, last = number(numbers["best"]), number(numbers["last"])
    said = f"The evaluation loss was lowest after {at} rounds, {best}, and is {last} now"
    if not at:
        said = f"The evaluation loss is {last}; untrained it was {best}"
    if overfits:
        said += (
            ", while the training loss goes on falling: the clients' examples are learnt by heart, or are unlike these"
        )
    folder = shlex.quote(str(run.folder))
    kind = "overfitting" if overfits else "best-earlier"
    severity: Severity = "warning" if grave else "note"
    if not at:
        return Finding(
            kind,
            severity,
            f"{said}.",
            "Nothing is gained yet: a lower algorithm.rate is the first thing to try.",
            numbers=numbers,
        )
    return Finding(kind, severity, f"{said}.", "Take the best:", f"fedmezo export {folder} --round {at}", numbers)


def traffic(run: Vitals) -> Iterator[Finding]:
    """Yields whether clients who come back late pull far more than the others.

    Ten times the median, and together over half of all that went down: then catching up is what traffic is spent on.
    """
    down = [visit.down for pulse in run.pulses[1:] for visit in pulse.visits]
    if not run.walks or len(down) < 10:
        return
    usual = median(down)
    late = [amount for amount in down if amount > 10 * usual]
    if sum(late) > 0.5 * sum(down):
        pool = (
            "algorithm.name=fedkseed bounds a pull by its pool"
            if not run.setting("algorithm.name", "").startswith("fedkseed")
            else "a smaller algorithm.pool, or federation.sums_coding=float16, bounds it"
        )
        yield Finding(
            "catching-up",
            "note",
            f"{len(late)} of {len(down)} pulls were over ten times the usual {size(usual)}, up to {size(max(late))}: "
            "clients that come back late fetch the steps they missed.",
            f"{pool[0].upper()}{pool[1:]}; a larger federation.cohort makes gaps shorter.",
            numbers={"usual": usual, "largest": max(late), "late": len(late)},
        )


def tempo(run: Vitals) -> Iterator[Finding]:
    """Yields whether forward passes have become 2.5 times as slow: median of the last third against the first."""
    each = [pulse.seconds / pulse.forwards for pulse in run.pulses if pulse.forwards and pulse.seconds > 0]
    third = len(each) // 3
    if third < 3:
        return
    first, last = median(each[:third]), median(each[-third:])
    if last > 2.5 * first:
        yield Finding(
            "slower",
            "note",
            f"A forward pass takes {duration(last)} now and took {duration(first)} at first, {last / first:.2g}x.",
            "Something else may use this machine, or memory is short; fewer runtime.threads or workers may help.",
            numbers={"first": first, "last": last},
        )


def health(run: Vitals) -> Iterator[Finding]:
    """Yields whether the journal is whole, the run complete, and made by this version."""
    folder = shlex.quote(str(run.folder))
    if run.broken:
        yield Finding(
            "unreadable",
            "problem",
            f"The journal can be read up to round {len(run.pulses)} only: {run.broken}",
            "If another version of fedmezo wrote it, use that one; else restore a copy of journal.sqlite.",
        )
    elif not run.pulses:
        command = "" if run.busy else f"fedmezo resume {folder}"
        yield Finding("empty", "note", "No round is complete yet.", "" if run.busy else "Go on with:", command)
    elif not run.finished:
        yield _unfinished(run, folder)
    if run.header.noise_version != NOISE_VERSION:
        yield Finding(
            "noise-version",
            "problem",
            f"The run's directions are noise v{run.header.noise_version}, this package makes v{NOISE_VERSION}.",
            f"To go on with it, or rebuild it, install fedmezo {run.header.package}.",
        )
    elif run.header.package != __version__:
        sentence = f"The run was begun by fedmezo {run.header.package}; this is {__version__}."
        yield Finding("version", "note", sentence, "If `fedmezo verify` agrees, go on.")


def _unfinished(run: Vitals, folder: str) -> Finding:
    done, planned = len(run.pulses), run.planned
    left = (planned - done) * median(pulse.seconds for pulse in run.pulses)
    numbers = {"rounds": done, "planned": planned, "seconds_left": left}
    if run.busy:
        sentence = f"The run is going on: {done} of {planned} rounds, about {duration(left)} of walks left."
        return Finding("running", "note", sentence, numbers=numbers)
    stopped = "The run has stopped" if run.busy is False else "The run is not complete"
    sentence = f"{stopped} after {done} of {planned} rounds; no finished round is lost."
    return Finding("stopped", "warning", sentence, "Go on, to the same bits:", f"fedmezo resume {folder}", numbers)
