"""A cell that follows the gradient of a model along a run: what the bounds are about, measured on a language model.

Only the measure backpropagates; the run itself is forward passes, as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain
from statistics import fmean
from typing import Any

import torch

from fedmezo.fl.algorithm import Point
from fedmezo.studies.build import Built, build
from fedmezo.studies.config import Config, changed
from fedmezo.studies.constants import measure_constants
from fedmezo.studies.sampling import SamplingOptions, exact_config, led_on
from fedmezo.studies.suite.kind_quadratic import bounds_of
from fedmezo.studies.suite.kind_run import config_of
from fedmezo.studies.suite.kinds import Found, Settings, probe_settings
from fedmezo.theory.constants import Setting

__all__ = ["follow", "squared_length"]

# Batches of rounds that no run here reaches; what is judged is nevertheless the loss that is trained on.
_AFTER = 1_000_000


def follow(settings: Settings, seed: int) -> Found:
    """Returns the squared gradient of the mean training loss along a run, and what bounds say of it.

    Settings: probe.examples (batches that estimate a gradient, over all clients), probe.points (evenly spaced rounds,
    the first one included, the last state not: the bounds are of the mean over t < T), probe.gain (c: the rate is
    c sqrt(N / (T H)), the form that the corollaries recommend; left out: algorithm.rate), probe.bounds (measure the
    constants at the start, and evaluate the bounds with them), probe.directions of those.
    """
    asked = probe_settings(settings, examples=32, points=10, gain=None, bounds=False, directions=16)
    config = exact_config(config_of(settings, seed))
    federation = config.federation
    clients, steps, rounds = federation.clients, federation.local_steps, federation.rounds
    if asked["gain"] is not None:
        rate = asked["gain"] * math.sqrt(clients / (rounds * steps))
        config = changed(config, {"algorithm": {"rate": rate}})
    built = build(config, measure=False)
    wanted = {round(rounds * number / asked["points"]) for number in range(asked["points"])} | {rounds}
    states = chain([0], led_on(built, rounds=rounds))
    points = [_judged(built, done, examples=asked["examples"]) for done in states if done in wanted]
    squares = [point["gradient2"] for point in points[:-1]]
    measured, least = fmean(squares), min(squares)
    values: dict[str, Any] = {"rate": built.config.algorithm.rate, "dim": built.bench.params.dim}
    values |= {"measured": measured, "least": least, "ratio": measured / squares[0]}
    values |= {"drop": points[0]["loss"] - points[-1]["loss"]}
    if asked["bounds"]:
        values |= _bounded(config, asked["directions"], points[0]["loss"], measured, least)
    return points, values


def _judged(built: Built, done: int, *, examples: int) -> dict[str, float]:
    """Returns loss and squared gradient at the bench's parameters, over `examples` batches dealt to the clients."""
    bench, clients = built.bench, len(built.data.parts)
    gradients, losses = [], []
    for number in range(max(2 * clients, examples)):
        place = (number % clients, _AFTER + number // clients, 0)
        loss, gradient = bench.gradient(Point(bench.params, 0, 0.0, *place))
        losses.append(loss)
        gradients.append(torch.cat([tensor.flatten() for tensor in gradient.values()]))
    return {"rounds": float(done), "loss": fmean(losses), "gradient2": squared_length(gradients)}


def squared_length(gradients: Sequence[torch.Tensor]) -> float:
    """Returns an unbiased estimate of |E g|^2 from independent gradients: the mean product of two different ones.

    The square of their mean would add a batch's variance over their number. May be below 0 where noise prevails.

    Args:
      gradients: at least two, of shape (d,).
    """
    many = len(gradients)
    total = torch.stack(list(gradients)).sum(0, dtype=torch.float64)
    own = sum(float(gradient.double().square().sum()) for gradient in gradients)
    return (float(total.square().sum()) - own) / (many * (many - 1))


def _bounded(config: Config, directions: int, gap: float, measured: float, least: float) -> dict[str, Any]:
    """Returns constants and bounds, these in the limit of small mu, whose own terms would only add to them.

    No loss is below 0, so the start's is the most that can be descended.
    """
    found = measure_constants(config, asked=SamplingOptions(directions=directions)).constants
    federation, rate = config.federation, float(config.algorithm.rate or 0.0)
    setting = Setting(
        clients=federation.clients, steps=federation.local_steps, rounds=federation.rounds, rate=rate, mu=0.0
    )
    return asdict(found) | bounds_of(found, setting, gap=gap, measured=measured, least=least)
