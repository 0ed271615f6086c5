"""The section that gives every client a rate of its own, and the algorithm made from it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from fedmezo.studies.keys import Section, key

if TYPE_CHECKING:
    from fedmezo.fl.algorithm import Algorithm
    from fedmezo.zo.noise import Law
    from fedmezo.zo.params import Params

__all__ = ["Personal", "complaint", "personalised"]


class Personal(Section):
    """A learning rate for each client: rate * (1 + alpha * Phi), Phi in [-1, 1]. A heuristic: see docs."""

    signal: Literal["none", "round-loss", "five-round-loss", "update-difference", "heterogeneity", "random"] = key(
        "What Phi is made of: none (one rate for all) | round-loss (last round's loss above the mean) | "
        "five-round-loss (over five rounds) | update-difference (how far the last update was from the mean one) | "
        "heterogeneity (squared gradient, from the slopes) | random (a control).",
        default="none",
    )
    alpha: float = key("Gain: the rate is multiplied by 1 + alpha * Phi.", default=0.5)
    mode: Literal["multiplicative", "additive"] = key(
        "multiplicative (the paper) | additive (its code): rate + delta * Phi.", default="multiplicative"
    )
    delta: float = key("Gain of the additive mode, in units of the rate.", default=5e-6)
    normaliser: Literal["maxabs", "zscore-tanh", "rank", "none"] = key(
        "From deviations to Phi: maxabs (over the largest) | zscore-tanh | rank | none (limited to [-1, 1]).",
        default="maxabs",
        also=("normalizer",),
    )
    window: int | None = key(
        'Rounds the signal is averaged over, and of warm-up; "auto" is 5 for five-round-loss, else 1.',
        default=None,
        word="auto",
        ge=1,
    )
    smoothing: float = key("Share of the last Phi that is kept.", default=0.0, also=("ema",), ge=0, lt=1)
    rate_min: float = key("Smallest factor on the rate.", default=0.25, ge=0, le=1)
    rate_max: float = key("Largest factor on the rate.", default=4.0, ge=1)
    cap: float | None = key(
        'Largest rate of any client, for instance a bound of docs/theory.md; "none" for no limit.',
        default=None,
        word="none",
        gt=0,
    )
    exact: bool = key(
        "update-difference: write the updates out at the server instead of comparing coefficients. heterogeneity: "
        "compare slopes along directions that clients share, which needs the fedkseed family.",
        default=False,
    )
    compat: bool = key(
        "The numbers of the paper's code: signals pass through float16, distances are sums over tensors.", default=False
    )
    shuffle: bool = key("A control: every Phi goes to a client drawn at random.", default=False)

    @model_validator(mode="after")
    def _means_something(self) -> Personal:
        if self.shuffle and self.signal in ("none", "random"):
            raise ValueError(f"personal.shuffle deals out the Phi of a signal, got personal.signal = {self.signal!r}.")
        if self.exact and self.signal not in ("update-difference", "heterogeneity"):
            raise ValueError(
                f'personal.exact is for personal.signal "update-difference" or "heterogeneity", got {self.signal!r}.'
            )
        if self.compat and self.signal == "heterogeneity":
            raise ValueError('personal.compat repeats the paper\'s code, which has no signal "heterogeneity".')
        return self


def complaint(personal: Personal, algorithm: str) -> str | None:
    """Returns why this algorithm cannot give the signal, in one sentence; None when it can."""
    if personal.signal != "heterogeneity":
        return None
    if algorithm == "fedavg":
        return (
            'personal.signal = "heterogeneity" is estimated from slopes, which algorithm.name = "fedavg" has not; '
            'choose "update-difference".'
        )
    if personal.exact and algorithm == "fedmezo":
        return (
            'personal.exact = true with "heterogeneity" compares slopes along shared directions, and every direction '
            'of algorithm.name = "fedmezo" is fresh; use "fedkseed", or personal.exact = false.'
        )
    return None


def personalised(
    algorithm: Algorithm[Any], personal: Personal, *, seed: int, rate: float, law: Law, params: Params | None
) -> Algorithm[Any]:
    """Returns the algorithm with the rates of the section; itself when there is one rate for all.

    Args:
      algorithm: the algorithm.
      personal: the section.
      seed: the run's seed.
      rate: the rate eta_0 in force.
      law: law of the directions.
      params: names and shapes of what is trained; needed for exact distances of walks only.
    """
    if personal.signal == "none":
        return algorithm
    # A configuration is read without torch.
    from fedmezo.fl import rates

    wanted = rates.Personal(
        personal.signal,
        alpha=personal.alpha,
        mode=personal.mode,
        delta=personal.delta,
        normaliser=personal.normaliser,
        window=personal.window,
        smoothing=personal.smoothing,
        lowest=personal.rate_min,
        highest=personal.rate_max,
        cap=math.inf if personal.cap is None else personal.cap,
        exact=personal.exact,
        compat=personal.compat,
        shuffle=personal.shuffle,
    )
    return rates.with_personal_rates(algorithm, wanted, seed=seed, rate=rate, params=params, law=law)
