"""What the theory says of a run whose constants were measured: caps on the rate, bounds, a forecast, plain advice.

The bounds of `fedmezo.theory` are guarantees, so they assume the worst. The forecast here is none: it is what one
round changes when the loss is a quadratic with the measured gradient and curvature and the clients' Hessians and
gradients hardly change within the round. It knows of no clip, momentum or decay.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmezo.errors import ConfigError
from fedmezo.studies.config import Config
from fedmezo.studies.measured import Measured, PointRow
from fedmezo.theory.beside import global_bounds
from fedmezo.theory.caps import b1_caps, b2_caps, paper_caps
from fedmezo.theory.constants import Constants, Setting
from fedmezo.theory.recommend import b1_advice, b2_advice

__all__ = ["Change", "advise", "best_rate", "check_fit", "forecast", "in_words", "predicted_change", "setting_of"]

SHARE = 0.1  # of the squared gradient that the bounds shall promise, and of the loss that the forecast shall take off
_GOALS = {
    "B1": "a tenth of |grad f|^2, B1",
    "B2": "a tenth of |grad f|^2, B2 (one step a round)",
    "forecast": "a tenth less loss, at the first round's pace",
}
_FAR = 10  # how many times below the best rate a rate is told to be low


@dataclass(frozen=True)
class Change:
    """The forecast of one round's change of f, nats.

    Attributes:
      descent: -eta H |grad f|^2.
      bend: eta^2 H^2 g'Hg / 2, of the round's mean step.
      noise: eta^2 (H / (N n)) (E e'He - g'Hg) / 2, of directions and batches.
    """

    descent: float
    bend: float
    noise: float

    @property
    def total(self) -> float:
        """The sum."""
        return self.descent + self.bend + self.noise


def predicted_change(setting: Setting, *, gradient2: float, along: float, stretch: float) -> Change:
    """Returns the forecast of one round, the second-order expansion of the clients' mean walk.

    The N H estimates are independent given the weights, so their noise adds up as H / N. Exact on quadratics for one
    step of clients that are alike.

    Args:
      setting: of the run.
      gradient2: |grad f|^2.
      along: g'Hg for g = grad f.
      stretch: E e'He for an estimate e from one direction and one batch.

    Source: bound B2 of docs/theory.md before its inequalities.
    """
    rate, steps, many = setting.rate, setting.steps, setting.clients * setting.directions
    half = rate**2 / 2
    return Change(-rate * steps * gradient2, half * steps**2 * along, half * steps / many * (stretch - along))


def best_rate(setting: Setting, *, gradient2: float, along: float, stretch: float) -> float:
    """Returns the rate at which `predicted_change` falls most; at twice this rate it falls no more.

    inf where the loss does not bend upwards, so that the forecast knows no limit; 0 where there is no gradient.

    Source: as `predicted_change`, a parabola in the rate.
    """
    width = setting.steps * along + (stretch - along) / (setting.clients * setting.directions)
    if gradient2 <= 0:
        return 0.0
    return gradient2 / width if width > 0 else math.inf


def setting_of(config: Config) -> Setting:
    """Returns what a resolved configuration sets of the theory; the cohort is N."""
    algorithm, federation = config.algorithm, config.federation
    return Setting(
        clients=federation.cohort or federation.clients,
        steps=federation.local_steps,
        rounds=federation.rounds,
        rate=float(algorithm.rate or 0),
        mu=float(algorithm.mu or 0),
        directions=algorithm.directions,
    )


def check_fit(measured: Measured, config: Config, *, dim: int) -> None:
    """Passes when the constants are those of this run's losses, as far as they tell.

    Raises:
      ConfigError: another number of trained scalars, clients or examples per batch.
    """
    federation = config.federation
    have = {"clients": federation.clients, "batch_size": federation.batch_size}
    pairs = [("trained numbers", measured.constants.dim, dim)]
    pairs += [(f"federation.{name}", measured.of.get(name, value), value) for name, value in have.items()]
    for name, known, wanted in pairs:
        if known != wanted:
            raise ConfigError(
                f"These constants were measured with {name} = {known}, this run has {wanted}; measure again with "
                "`fedmezo analyze constants`."
            )


def forecast(measured: Measured, setting: Setting) -> dict[str, Any]:
    """Returns the theory's numbers as plain values: constants, caps, bounds, rounds to a target, one round's change."""
    known, start = measured.constants, measured.rows[0]
    change = predicted_change(setting, **_sizes(start))
    pair = [best_rate(setting, **sizes) for sizes in _ends(start)]
    totals = [predicted_change(setting, **sizes).total for sizes in _ends(start)]
    caps = {
        "printed": paper_caps(known, clients=setting.clients, steps=setting.steps),
        "B1": b1_caps(known, steps=setting.steps),
        "B2, one step": b2_caps(known, clients=setting.clients, directions=setting.directions),
    }
    bounds = global_bounds(known, setting, gap=_gap(measured))
    return {
        "constants": {name: getattr(known, name) for name in measured.intervals},
        "intervals": {name: list(interval) for name, interval in measured.intervals.items()},
        "caps": {name: {"rate": cap.rate, "binding": cap.binding.formula} for name, cap in caps.items()},
        "bounds": {bound.name: {"gradient2": bound.total, "vacuous": bound.reason} for bound in bounds},
        "rounds": _rounds(measured, setting, change),
        "first_round": {
            "descent": change.descent,
            "bend": change.bend,
            "noise": change.noise,
            "change": change.total,
            "interval": totals[::-1],
        },
        "best_rate": {"rate": best_rate(setting, **_sizes(start)), "interval": pair},
    }


def _sizes(row: PointRow) -> dict[str, float]:
    return {name: getattr(row, name) for name in ("gradient2", "along", "stretch")}


def _ends(row: PointRow) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the worst and the best that the intervals leave open, all at once: more than 95 %."""
    spans = {name: row.intervals[name] for name in ("gradient2", "along", "stretch")}
    worst = {name: high for name, (_, high) in spans.items()} | {"gradient2": spans["gradient2"][0]}
    return worst, {name: low for name, (low, _) in spans.items()} | {"gradient2": spans["gradient2"][1]}


def in_words(theory: Mapping[str, Any] | None) -> dict[str, str]:
    """Returns what `forecast` found as one line per number, for people; nothing for nothing."""
    if theory is None:
        return {}
    spans = theory["intervals"]
    lines = {name: f"{value:.3g} ({_span(spans[name])})" for name, value in theory["constants"].items()}
    for name, cap in theory["caps"].items():
        lines[f"largest rate, {name}"] = f"{cap['rate']:.3g} = {cap['binding']}"
    best = theory["best_rate"]
    lines["best rate, forecast"] = f"{best['rate']:.3g} ({_span(best['interval'])}); at twice this nothing falls"
    for name, bound in theory["bounds"].items():
        source = f"{name}, which holds" if name in ("B1", "B2") else f"{name}, printed without a valid proof"
        said = f"vacuous. {bound['vacuous']}" if bound["vacuous"] else f"at most {bound['gradient2']:.3g}"
        lines[f"mean |grad f|^2 by {source}"] = said
    for name, known in theory["rounds"].items():
        lines[f"rounds to {_GOALS[name]}"] = (
            "never: the loss does not fall" if known is None else f"{known['rounds']:.3g} at rate {known['rate']:.3g}"
        )
    first = theory["first_round"]
    parts = ", ".join(f"{name} {first[name]:.3g}" for name in ("descent", "bend", "noise"))
    said = f"{first['change']:.3g} nats ({_span(first['interval'])}): {parts}"
    return lines | {"first round, forecast": said}


def _span(interval: Sequence[float]) -> str:
    return "no interval" if math.isnan(interval[0]) else f"{interval[0]:.3g} to {interval[1]:.3g}"


def _gap(measured: Measured) -> float:
    """Returns the most the loss can fall: no loss is below 0."""
    return measured.rows[0].loss


def _rounds(measured: Measured, setting: Setting, change: Change) -> dict[str, dict[str, float] | None]:
    """Returns rounds until a tenth of the squared gradient by the bounds, until a tenth less loss by the forecast."""
    start, known, gap = measured.rows[0], measured.constants, _gap(measured)
    found: dict[str, dict[str, float] | None] = {}
    if start.gradient2 > 0:
        target, many = SHARE * start.gradient2, setting.directions
        one = b1_advice(known, steps=setting.steps, gap=gap, target=target)
        two = b2_advice(known, clients=setting.clients, gap=gap, target=target, directions=many)
        found = {"B1": {"rounds": one.rounds, "rate": one.rate}, "B2": {"rounds": two.rounds, "rate": two.rate}}
    falls = change.total < 0
    rounds = math.ceil(SHARE * start.loss / -change.total) if falls else 0
    return found | {"forecast": {"rounds": rounds, "rate": setting.rate} if falls else None}


def advise(measured: Measured, setting: Setting) -> list[str]:
    """Returns sentences about the rate and the local steps; none about what is as it should be."""
    return [*_about_sureness(measured), *_about_caps(measured.constants, setting), *_about_forecast(measured, setting)]


def _about_sureness(measured: Measured) -> Iterator[str]:
    start = measured.rows[0]
    low, high = start.intervals["gradient2"]
    if not low > 0:
        yield (
            f"|grad f|^2 is not told from noise ({low:.2g} to {high:.2g}): take more directions or batches before "
            "you trust what follows."
        )
    if math.isnan(measured.intervals["effective_rank"][0]):
        yield (
            "No effective rank was found, for the Hessian looks indefinite where it was measured. L is its Frobenius "
            "norm, which |H|op does not pass, and r is set to 1."
        )


def _about_caps(known: Constants, setting: Setting) -> Iterator[str]:
    rate, steps = setting.rate, setting.steps
    one, printed = b1_caps(known, steps=steps), paper_caps(known, clients=setting.clients, steps=steps)
    two = b2_caps(known, clients=setting.clients, directions=setting.directions)
    if not one.allow(rate):
        yield (
            f"H = {steps} forces rate <= {one.rate:.2g} under B1 ({one.binding.formula}), {rate / one.rate:.2g} times "
            f"below {rate:.3g}: B1 promises nothing here. It counts all {known.dim:,} directions and is far below "
            "what works in practice; no run need keep it."
        )
    if not printed.allow(rate):
        fewer = _fitting_steps(known, setting)
        yield (
            f"The printed condition allows rate <= {printed.rate:.2g}; its binding term is {printed.binding.formula}; "
            + (f"try H = {fewer}." if fewer else "no H meets it at this rate.")
        )
    if not two.allow(rate):
        yield (
            f"B2, which is for one local step, allows rate <= {two.rate:.2g}. It counts the effective rank "
            f"r = {known.effective_rank:.3g} in the place of d, and is nearer to what works in practice."
        )


def _fitting_steps(known: Constants, setting: Setting) -> int:
    """Returns the most local steps with which the printed condition allows the rate; 0 for none."""
    scale = 3 * setting.rate * known.smoothness
    limits = (1 / (scale * math.sqrt(known.c_g * known.dim)), setting.clients / (scale * known.c_g))
    return math.floor(min(*limits, 1 / math.sqrt(setting.rate)) * (1 + 1e-12))


def _about_forecast(measured: Measured, setting: Setting) -> Iterator[str]:
    start, rate = measured.rows[0], setting.rate
    if start.gradient2 <= 0:
        return
    low, high = (best_rate(setting, **sizes) for sizes in _ends(start))
    if rate > 2 * high:
        yield (
            f"At rate {rate:.3g} noise and curvature outweigh the descent from the first round on, unless clipping "
            f"helps: the forecast is best at {best_rate(setting, **_sizes(start)):.2g}, at most {high:.2g}."
        )
    elif rate < low / _FAR:
        yield f"rate {rate:.3g} is far below {low:.2g}, the least at which the forecast of a round is best."
    if start.batch2 > 2 * _FAR * start.gradient2:
        yield (
            f"E|grad F|^2 is {start.batch2 / start.gradient2:.3g} times |grad f|^2: steps are mostly batch noise; a "
            "larger batch or cohort makes them better."
        )
