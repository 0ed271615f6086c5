"""A cell that asks what happens when the trained parameters are kept in few bits, as the released code keeps them.

Both methods compute in float32; after every step the parameters are rounded to the nearest number of the format. So
what differs between formats is how much of a step survives, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from fedmezo.fl.algorithm import Point
from fedmezo.studies.build import Built, build
from fedmezo.studies.suite.kind_run import config_of
from fedmezo.studies.suite.kinds import Found, Settings, probe_settings
from fedmezo.zo.noise import derive_seed, round_coefficient
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_

__all__ = ["store"]

_FORMATS: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def store(settings: Settings, seed: int) -> Found:
    """Returns the evaluations of one client's steps, and which share of the parameters ever moved.

    Settings: probe.storage (a number format), probe.method (walk | sgd), probe.every (steps between evaluations).
    """
    asked = probe_settings(settings, storage="float32", method="walk", every=20)
    built, kind = build(config_of(settings, seed), measure=False), _FORMATS[asked["storage"]]
    params = built.bench.params
    _keep_(params, kind)
    start = params.clone()
    steps = built.config.federation.rounds * built.config.federation.local_steps
    points = [_judged(built, 0)]
    for step in range(steps):
        _walk_(built, step) if asked["method"] == "walk" else _descend_(built, step)
        _keep_(params, kind)
        if (step + 1) % asked["every"] == 0 or step + 1 == steps:
            points.append(_judged(built, step + 1))
    return points, {"dim": params.dim, "moved": _moved(params, start), "way": _way(params, start)}


def _point(built: Built, step: int, *, seed: int = 0, offset: float = 0.0) -> Point:
    return Point(built.bench.params, seed, offset, 0, *divmod(step, built.config.federation.local_steps))


def _walk_(built: Built, step: int) -> None:
    """Takes one two-point step in place."""
    bench, algorithm = built.bench, built.config.algorithm
    seed = derive_seed("storage", built.config.federation.seed, step)
    mu = round_coefficient(float(algorithm.mu or 1e-3))
    above, below = bench.losses([_point(built, step, seed=seed, offset=side * mu) for side in (1, -1)])
    slope = (above - below) / (2 * mu)
    if math.isfinite(slope):
        step_(bench.params, seed, coefficient=-float(algorithm.rate or 0) * slope, law=algorithm.law)


def _descend_(built: Built, step: int) -> None:
    """Takes one step along the gradient in place."""
    bench, rate = built.bench, float(built.config.algorithm.rate or 0)
    loss, gradient = bench.gradient(_point(built, step))
    if math.isfinite(loss):
        bench.params.copy_(Params({name: tensor.detach() - rate * gradient[name] for name, tensor in bench.params}))


def _keep_(params: Params, kind: torch.dtype) -> None:
    """Rounds the parameters to the nearest numbers of a format."""
    if kind != torch.float32:
        params.copy_(Params({name: _rounded(tensor, kind) for name, tensor in params}))


def _rounded(tensor: Tensor, kind: torch.dtype) -> Tensor:
    return tensor.detach().to(kind).to(tensor.dtype)


def _judged(built: Built, steps: int) -> dict[str, float]:
    found = built.bench.evaluate(built.data.evaluation["eval"])
    return {"rounds": steps / built.config.federation.local_steps, "steps": steps, "loss": found.loss}


def _moved(params: Params, start: Params) -> float:
    """Returns which share of the scalars is not where it began."""
    return sum(int((tensor != start[name]).sum()) for name, tensor in params) / params.dim


def _way(params: Params, start: Params) -> float:
    """Returns how far the parameters are from where they began, root mean square per scalar."""
    squares = [float((tensor.detach() - start[name]).double().square().mean()) for name, tensor in params]
    return math.sqrt(fmean(squares))
