"""Symptoms of single steps: losses that are not finite, rate, mu, clip."""

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean

from fedmezo.studies.doctor.course import improves
from fedmezo.studies.doctor.finding import Finding
from fedmezo.studies.doctor.vitals import Pulse, Vitals
from fedmezo.studies.page import number

__all__ = ["clipping", "idle", "mu", "pace", "skipped"]

_MOSTLY = 0.8
_MUCH = 0.1


def skipped(run: Vitals) -> Iterator[Finding]:
    """Yields how many directions were skipped because a loss was not finite, whose, and since when.

    A problem when it still happens in a tenth of the last rounds' directions, or when a client of backpropagation has
    no loss; else a warning. It is one client's data when at least 80 % of the skips are that client's and several
    clients took part.
    """
    lost = Counter({client: sum(v.skipped for _, v in visits) for client, visits in run.clients.items()})
    for client, visits in run.clients.items():
        lost[client] += sum(not run.walks and not math.isfinite(visit.loss) for _, visit in visits)
    total = sum(lost.values())
    if not total:
        return
    asked = sum(visit.slopes if run.walks else 1 for pulse in run.pulses for visit in pulse.visits)
    first = next(pulse.round for pulse in run.pulses if _lost(pulse, walks=run.walks))
    recent, share = run.recent(), _share(run.recent(), walks=run.walks)
    worst, most = lost.most_common(1)[0]
    one = len(run.clients) > 1 and most >= _MOSTLY * total
    whose = f", {most} of them at client {worst}" if one else f", at {sum(map(bool, lost.values()))} clients"
    what = "directions" if run.walks else "walks"
    yield Finding(
        "not-finite",
        "problem" if share >= _MUCH else "warning",
        f"{total:,} of {asked:,} {what} had a loss that was not finite{whose}, since round {first + 1} "
        f"({share:.0%} in the last {len(recent)} rounds).",
        f"Look at the data of client {worst} first. {_cure(run)}" if one else _cure(run),
        numbers={
            "skipped": total,
            "of": asked,
            "share_lately": share,
            "first_round": first,
            "clients": dict(lost),
            "one": one,
        },
    )


def _lost(pulse: Pulse, *, walks: bool) -> int:
    return sum(v.skipped if walks else not math.isfinite(v.loss) for v in pulse.visits)


def _share(pulses: Sequence[Pulse], *, walks: bool) -> float:
    asked = sum(visit.slopes if walks else 1 for pulse in pulses for visit in pulse.visits)
    return sum(_lost(pulse, walks=walks) for pulse in pulses) / max(asked, 1)


def _cure(run: Vitals) -> str:
    dtype = str(run.setting("model.dtype", "float32"))
    if dtype == "float16":
        return "float16 overflows above 65504: set model.dtype=bfloat16, or float32."
    lower = f"{run.pulses[0].rate / 3:.2g}"
    wider = f" and algorithm.mu={run.pulses[0].mu / 3:.2g}" if run.walks else ""
    return f"With {dtype} the weights have run away: set algorithm.rate={lower}{wider}."


def idle(run: Vitals) -> Iterator[Finding]:
    """Yields rounds that cannot have moved the model: every rate 0, or every slope 0."""
    still = [pulse for pulse in run.pulses if pulse.visits and all(visit.rate == 0 for visit in pulse.visits)]
    flat = [at for at, kind, _ in run.events if kind == "zero-slope"] if run.walks else []
    if still:
        yield Finding(
            "zero-rate",
            "problem" if len(still) > 1 else "warning",
            f"The rate was 0 for every client in {len(still)} of {len(run.pulses)} rounds; nothing was learnt in them.",
            "Set algorithm.rate; if it was algorithm.decay, spread it over more rounds with `fedmezo resume --rounds`.",
            numbers={"rounds": [pulse.round for pulse in still]},
        )
    if flat:
        yield Finding(
            "zero-slope",
            "problem" if 2 * len(flat) >= len(run.pulses) else "warning",
            f"Every slope was 0 in {len(flat)} of {len(run.pulses)} rounds, first in round {flat[0] + 1}: the loss "
            "does not feel the trained parameters.",
            "Raise algorithm.mu tenfold, and see that adapter.targets name layers of this model and prompts leave room "
            "for answers (data.max_tokens).",
            numbers={"rounds": flat},
        )


def pace(run: Vitals) -> Iterator[Finding]:
    """Yields a rate far from 0.3 / sqrt(d), one that has decayed away, and one that guards have cut.

    Measured on two models without a clip, one and a half to seven times 0.3 / sqrt(d) held for some hundred steps and
    twice that surged; a clip lets about three times more through. Below a thirtieth, progress hardly shows. The same
    limits as in `fedmezo plan`. Rates of backpropagation and of normalised steps have another unit.
    """
    if not run.pulses:
        return
    rate, last = run.pulses[0].rate, run.pulses[-1]
    if run.walks and run.dim and not run.setting("algorithm.normalise") and rate > 0:
        ratio, bare = rate / run.start_rate, run.setting("algorithm.clip") == "none"
        near = f"rate {rate:.2g} is {number(ratio, 2)} times 0.3/sqrt(d) = {run.start_rate:.2g}"
        if ratio > (4 if bare else 12):
            why = " and nothing clips the slopes" if bare else ""
            advice = f"Expect a surge; begin with --set algorithm.rate={run.start_rate:.2g}"
            yield Finding("rate-high", "warning", f"The {near}{why}.", advice, numbers={"rate": rate, "ratio": ratio})
        elif ratio < 1 / 30:
            advice = f"Progress will hardly show; try --set algorithm.rate={run.start_rate:.2g}"
            yield Finding("rate-low", "warning", f"The {near}.", advice, numbers={"rate": rate, "ratio": ratio})
    if run.setting("algorithm.decay", "constant") != "constant" and 0 < last.rate < 0.05 * rate * last.slowed:
        yield Finding(
            "decayed",
            "note",
            f"The rate has decayed to {last.rate / rate:.1%} of its start; later rounds would hardly learn.",
            "To go on, spread the decay over more rounds:",
            f"fedmezo resume {shlex.quote(str(run.folder))} --rounds {2 * run.planned}",
            numbers={"rate": last.rate},
        )
    if last.slowed <= 0.125:
        yield Finding(
            "slowed",
            "warning",
            f"Guards have cut the rate to {last.slowed:.2g} of what was asked for; the run is slow since then.",
            f"Start again with --set algorithm.rate={rate * last.slowed * 2:.2g}",
            numbers={"slowed": last.slowed},
        )


def mu(run: Vitals) -> Iterator[Finding]:
    """Yields a mu at which the difference of two losses is mostly rounding, or too wide to be a slope.

    Measured: a bfloat16 forward at 1e-3 has an error of 0.7 to 6 times the signal, 1e-2 is fine; float32 is usable from
    1e-5 to 1e-2.
    """
    if not run.walks:
        return
    width, dtype = run.pulses[-1].mu, str(run.setting("model.dtype", "float32"))
    if dtype != "float32" and width < 5e-3:
        sentence = f"mu {width:.2g} with a {dtype} model measures mostly rounding, not slopes."
        yield Finding(
            "mu", "warning", sentence, "Set algorithm.mu=0.01, or model.dtype=float32.", numbers={"mu": width}
        )
    elif dtype == "float32" and not 1e-5 * (1 - 1e-9) <= width <= 1e-2 * (1 + 1e-9):
        side = "rounding hides the slope" if width < 1e-5 else "the two losses are too far apart for a slope"
        sentence = f"mu {width:.2g} is outside 1e-5 to 1e-2, the window of a float32 model: {side}."
        yield Finding("mu", "warning", sentence, "Set algorithm.mu=0.001.", numbers={"mu": width})


def clipping(run: Vitals) -> Iterator[Finding]:
    """Yields whether the clip, and no longer the rate, sets the pace: half of the last rounds' slopes at the limit.

    At three robust scales 0.3 % of normal slopes are. The scale that sets the limit rises by 2 % a round only, so
    slopes that grow faster meet it more and more often; that is what it is for, so while the loss falls it is a note.
    """
    seen = [visit.clipped for pulse in run.recent() for visit in pulse.visits if math.isfinite(visit.clipped)]
    share = fmean(seen) if seen else 0.0
    if share < 0.5:
        return
    well = improves(run)
    yield Finding(
        "clipped",
        "note" if well else "warning",
        f"{share:.0%} of the last rounds' slopes were cut by the clip: it sets the pace, no longer the rate.",
        "The loss falls, so leave it."
        if well
        else f"Slopes have grown: try algorithm.rate={run.pulses[-1].rate / 2:.2g}, "
        "or algorithm.directions=4, which halves their noise.",
        numbers={"share": share},
    )
