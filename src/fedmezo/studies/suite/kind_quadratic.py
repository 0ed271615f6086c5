"""Cells of the theory: descent on quadratics with planted constants beside the bounds, and moments of the estimator."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedmezo.studies.suite.kinds import Found, Settings, probe_settings
from fedmezo.studies.suite.quadratics import Array, Quadratic, average, course, plant
from fedmezo.theory.caps import b1_caps, b2_caps, paper_caps
from fedmezo.theory.constants import Setting, gamma
from fedmezo.theory.corrected import b1, b2, b2_floor
from fedmezo.theory.printed import corollary_3_2, corollary_3_5

__all__ = ["bounds_of", "descend", "estimate"]


def descend(settings: Settings, seed: int) -> Found:
    """Returns the exact course of a federated quadratic, and every bound on its mean squared gradient.

    Settings: probe.dim, rank, clients, steps, rounds, apart, wobble, noise, rate (a number, or of: b1 | b2 | paper, a
    cap, or best, the rate that B2 recommends), probe.share of that rate.
    """
    asked = probe_settings(
        settings, dim=40, rank=4.0, clients=3, steps=1, rounds=200, apart=0.0, wobble=0.0, noise=0.0, rate="b2",
        share=1.0,
    )  # fmt: skip
    names = ("dim", "rank", "clients", "apart", "wobble", "noise")
    problem, start = plant(seed, **{name: asked[name] for name in names})
    known, clients, steps = problem.constants(), asked["clients"], asked["steps"]
    caps = {
        "b1": b1_caps(known, steps=steps).rate,
        "b2": b2_caps(known, clients=clients).rate,
        "paper": paper_caps(known, clients=clients, steps=steps).rate,
    }
    known_rates = caps | {"best": _best(problem, start, clients=clients, taken=steps * asked["rounds"], cap=caps["b2"])}
    rate = asked["share"] * float(known_rates.get(str(asked["rate"]), asked["rate"]))
    setting = Setting(clients=clients, steps=steps, rounds=asked["rounds"], rate=rate, mu=0.0)
    gaps, squares = course(problem, start, setting=setting)
    both = enumerate(zip(gaps, squares, strict=True))
    points = [{"rounds": float(t), "loss": gap, "gradient2": square} for t, (gap, square) in both]
    measured = average(squares)
    values: dict[str, Any] = {"rate": rate, "measured": measured, "least": min(squares), "end_gap": gaps[-1]}
    values |= {f"cap_{name}": cap for name, cap in caps.items()}
    values |= {"dim": asked["dim"], "ratio_least": min(squares) / squares[0], "drop": gaps[0] - gaps[-1]}
    return _thinned(points), values | bounds_of(known, setting, gap=gaps[0], measured=measured, least=min(squares))


def _best(problem: Quadratic, start: Array, *, clients: int, taken: int, cap: float) -> float:
    """Returns the rate that makes B2 least over so many steps: sqrt(2 gap N / (T H L gamma noise)), or the cap."""
    known = problem.constants()
    gap, floor = problem.gap(start, np.zeros_like(start)), b2_floor(known, clients=clients)
    return min(cap, math.sqrt(2 * gap / (taken * floor))) if floor else cap


def bounds_of(known: Any, setting: Setting, *, gap: float, measured: float, least: float) -> dict[str, Any]:
    """Returns the bounds, and what was measured over each: above 1 the bound is broken, below 0 it is impossible."""
    corollary = corollary_3_2 if known.identical else corollary_3_5
    found = {"b1": b1(known, setting, gap=gap), "printed": corollary(known, setting, gap=gap)}
    if setting.steps == 1:
        found["b2"] = b2(known, setting, gap=gap)
    values: dict[str, Any] = {}
    for name, bound in found.items():
        values[f"bound_{name}"] = bound.total
        values[f"vacuous_{name}"] = int(bound.vacuous)
        seen = least if name == "printed" else measured  # the corollaries bound the smallest, ours the mean
        values[f"over_{name}"] = seen / bound.total if bound.total > 0 else math.inf
        values[f"broken_{name}"] = int(not seen <= bound.total)
    return values


def _thinned(points: list[dict[str, float]], most: int = 24) -> list[dict[str, float]]:
    stride = max(1, len(points) // most)
    return [*points[:-1:stride], points[-1]]


def estimate(settings: Settings, seed: int) -> Found:
    """Returns sampled moments of the two-point estimate of a planted gradient, over what is printed and what is right.

    Settings: probe.dim, probe.directions (n), probe.samples, probe.rank.
    """
    asked = probe_settings(settings, dim=30, directions=1, samples=4000, rank=3.0)
    dim, many = asked["dim"], asked["directions"]
    problem, start = plant(seed, dim=dim, rank=asked["rank"], clients=1)
    gradient = problem.spectrum * (start - problem.optimum)
    generator = np.random.default_rng([seed, 1])
    z = generator.normal(size=(asked["samples"], many, dim))
    found = (z * (z @ gradient)[..., None]).mean(1)
    square = float(gradient @ gradient)
    length = float((found**2).sum(1).mean()) / square
    bend = float(((found**2) @ problem.spectrum).mean()) / (problem.spectrum.max() * square)
    known = problem.constants()
    return [], {
        "mean_error": float(np.linalg.norm(found.mean(0) - gradient)) / math.sqrt(square),
        "length2": length,
        "length2_over_gaussian": length / ((dim + many + 1) / many),
        "length2_over_printed": length / (2 / dim),
        "growth": bend,
        "growth_over_gamma": bend / gamma(known, directions=many, kind="gaussian"),
        "growth_over_printed": bend / gamma(known, directions=many, kind="paper"),
    }
