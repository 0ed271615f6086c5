"""Symptoms of single clients: one that stands out, weighs most, holds little, or is never there."""

import math
from collections.abc import Iterator, Mapping
from statistics import fmean, median

from fedmezo.studies.doctor.finding import Finding
from fedmezo.studies.doctor.vitals import Vitals
from fedmezo.studies.page import number

__all__ = ["absent", "heavy", "outliers", "small"]

_FAR = 6.0
_ENOUGH = 4


def outliers(run: Vitals) -> Iterator[Finding]:
    """Yields clients whose loss or slopes are far from everyone else's.

    Far: six robust deviations of the clients' medians (the deviation taken as at least a tenth of their median), and at
    least twice or at most half the median in loss, four times or a quarter in slopes. Clients differ in what they hold,
    so less than that is what federated data look like. Fewer than four clients tell nothing.
    """
    lost = {c: [v.loss for _, v in visits if math.isfinite(v.loss)] for c, visits in run.clients.items()}
    scales = {c: [v.scale for _, v in visits if v.scale > 0] for c, visits in run.clients.items()}
    for name, seen, least in (("loss", lost, 2.0), ("slopes", scales, 4.0)):
        values = {client: median(some) for client, some in seen.items() if len(some) >= 3}
        for client, value in _far(values, least=least).items():
            middle = median(values.values())
            yield Finding(
                "odd-client",
                "warning",
                f"Client {client} stands out: its {name} {'are' if name == 'slopes' else 'is'} {number(value, 3)}, the "
                f"median client's {number(middle, 3)}.",
                "Look at its data: empty or cut answers, another language, another prompt.",
                numbers={"client": client, "what": name, "value": value, "median": middle},
            )


def _far(values: Mapping[int, float], *, least: float) -> dict[int, float]:
    if len(values) < _ENOUGH:
        return {}
    middle = median(values.values())
    spread = max(1.4826 * median(abs(value - middle) for value in values.values()), 0.1 * abs(middle))
    return {
        client: value
        for client, value in values.items()
        if abs(value - middle) > _FAR * spread or (value < middle / least and middle - value > _FAR / 2 * spread)
        if middle > 0 and not middle / least <= value <= middle * least
    }


def heavy(run: Vitals) -> Iterator[Finding]:
    """Yields a client that has over half of the weight of its rounds, in rounds of three clients or more."""
    crowd = {pulse.round for pulse in run.pulses if len(pulse.visits) >= 3}
    for client, visits in run.clients.items():
        weights = [visit.weight for at, visit in visits if at in crowd]
        if weights and fmean(weights) > 0.5:
            yield Finding(
                "heavy-client",
                "warning",
                f"Client {client} has {fmean(weights):.0%} of the weight of its rounds; the model is mostly its own.",
                "If that is not wanted, set federation.weighting=uniform.",
                numbers={"client": client, "weight": fmean(weights)},
            )


def absent(run: Vitals) -> Iterator[Finding]:
    """Yields how many clients have had no turn, when that is over a tenth of them.

    With c of N clients drawn evenly for each of n rounds, (1 - c/N)^n of them are expected to have had none.
    """
    everyone = int(run.setting("federation.clients", 0))
    missing = sorted(set(range(everyone)) - set(run.clients))
    if not run.pulses or len(missing) <= 0.1 * everyone:
        return
    drawn = fmean(len(pulse.visits) for pulse in run.pulses)
    expected = everyone * (1 - drawn / everyone) ** len(run.pulses)
    wanted = math.ceil(math.log(0.05) / math.log(1 - drawn / everyone)) if drawn < everyone else 1
    yield Finding(
        "absent",
        "note",
        f"{len(missing)} of {everyone} clients have had no turn in {len(run.pulses)} rounds of {drawn:.3g}; drawn "
        f"evenly, {expected:.0f} are expected to have none.",
        f"Their data count for nothing yet; about {wanted} rounds bring in 95 % of the clients, or raise "
        "federation.cohort.",
        numbers={"absent": missing, "expected": expected, "rounds_for_95": wanted},
    )


def small(run: Vitals) -> Iterator[Finding]:
    """Yields clients that hold fewer examples than a batch takes."""
    split = run.summary.get("split")
    sizes = split.get("sizes", ()) if isinstance(split, Mapping) else ()
    batch = int(run.setting("federation.batch_size", 1))
    few = [client for client, size in enumerate(sizes) if size < batch]
    if few:
        yield Finding(
            "small-clients",
            "warning",
            f"{len(few)} of {len(sizes)} clients hold fewer examples than a batch of {batch}, the smallest "
            f"{min(sizes)}; they see the same ones several times a step.",
            "Set split.min_examples, or a smaller federation.batch_size.",
            numbers={"clients": few},
        )
