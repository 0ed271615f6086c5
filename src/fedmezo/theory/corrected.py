"""Bounds that hold: B1 for any number of local steps, B2 for one local step with the effective rank.

They are this project's, not the paper's. Both are for Gaussian directions, all N clients in every round with weight
1 / N, and the plain method: no clip, no momentum, no normalising. docs/theory.md has the derivations. Heterogeneity
enters both with a plus.
"""

import math

from fedmezo.errors import ConfigError
from fedmezo.theory.bound import Bound, global_bound, step_bound
from fedmezo.theory.caps import b1_caps, b1_growth, b2_caps, b2_growth
from fedmezo.theory.chain import estimate_constant
from fedmezo.theory.constants import Constants, Kind, Setting, gamma

__all__ = ["b1", "b1_floor", "b1_step", "b2", "b2_floor", "b2_step"]


def b1_floor(constants: Constants) -> float:
    """Returns W = q sigma_h2 + 2 (d + 2) sigma_g2, the moment of an estimate where grad f is 0, as mu goes to 0.

    Source: bound B1 of docs/theory.md.
    """
    return b1_growth(constants) * constants.sigma_h2 + 2 * (constants.dim + 2) * constants.sigma_g2


def b1_step(constants: Constants, setting: Setting, *, gradient2: float, gap: float = math.inf) -> Bound:
    """Returns the bound on a round's change in loss for any number of local steps.

    -(eta H / 4) |grad f|^2 + eta H mu^2 L^2 d + eta^2 H^2 L (q sigma_h2 + 2 (d + 2) sigma_g2 + B).

    Args:
      constants: of the losses; the effective rank is not used.
      setting: of the run; n > 1 directions are covered, but not rewarded.
      gradient2: |grad f(theta^t)|^2.
      gap: f(theta^t) - f*; inf when unknown.

    Source: bound B1 of docs/theory.md.
    """
    reach, smooth = setting.rate * setting.steps, constants.smoothness
    terms = {
        "descent": -reach / 4 * gradient2,
        "smoothing": reach * setting.mu**2 * smooth**2 * constants.dim,
        "heterogeneity": reach**2 * smooth * b1_growth(constants) * constants.sigma_h2,
        "noise": reach**2 * smooth * 2 * (constants.dim + 2) * constants.sigma_g2,
        "perturbation": reach**2 * smooth * estimate_constant(constants, mu=setting.mu),
    }
    caps = b1_caps(constants, steps=setting.steps)
    return step_bound("B1, one round", terms, gap=gap, rate=setting.rate, caps=caps)


def b1(constants: Constants, setting: Setting, *, gap: float) -> Bound:
    """Returns the bound on the squared gradient for any number of local steps, given the gap f(theta^0) - f*.

    4 (f0 - f*) / (eta H T) + 4 mu^2 L^2 d + 4 eta L H (q sigma_h2 + 2 (d + 2) sigma_g2 + B).

    Source: bound B1 of docs/theory.md; in the place of Corollaries 3.2 and 3.5.
    """
    reach, smooth = setting.rate * setting.steps, constants.smoothness
    terms = {
        "initial gap": 4 * gap / (reach * setting.rounds),
        "smoothing": 4 * setting.mu**2 * smooth**2 * constants.dim,
        "heterogeneity": 4 * reach * smooth * b1_growth(constants) * constants.sigma_h2,
        "noise": 4 * reach * smooth * 2 * (constants.dim + 2) * constants.sigma_g2,
        "perturbation": 4 * reach * smooth * estimate_constant(constants, mu=setting.mu),
    }
    caps = b1_caps(constants, steps=setting.steps)
    return global_bound("B1", terms, gap=gap, smoothness=smooth, rate=setting.rate, caps=caps)


def b2_floor(constants: Constants, *, clients: int, directions: int = 1, kind: Kind = "gaussian") -> float:
    """Returns L (gamma / N) (c_g sigma_h2 + sigma_g2), what B2 says of the squared gradient, divided by the rate.

    Source: bound B2 of docs/theory.md.
    """
    share = gamma(constants, directions=directions, kind=kind) / clients
    return constants.smoothness * share * (constants.c_g * constants.sigma_h2 + constants.sigma_g2)


def b2_step(
    constants: Constants,
    setting: Setting,
    *,
    gradient2: float,
    gap: float = math.inf,
    kind: Kind = "gaussian",
) -> Bound:
    """Returns the bound on a round's change in loss for one local step, at any rate.

    -eta |grad f|^2 + (eta^2 L / 2) ((1 + c_g (1 + c_h) gamma / N) |grad f|^2 + (gamma / N) (c_g sigma_h2 + sigma_g2)).

    Args:
      constants: of the losses; Assumption 1 must hold on the whole step.
      setting: of the run, with steps = 1; mu is taken as 0, which is exact on quadratics.
      gradient2: |grad f(theta^t)|^2.
      gap: f(theta^t) - f*; inf when unknown.
      kind: sphere or gaussian directions; the printed gamma does not give a bound.

    Raises:
      ConfigError: more than one local step, or the printed gamma.

    Source: bound B2 of docs/theory.md.
    """
    _check_b2(setting, kind)
    bend = setting.rate**2 * constants.smoothness / 2
    growth = b2_growth(constants, clients=setting.clients, directions=setting.directions, kind=kind)
    share = gamma(constants, directions=setting.directions, kind=kind) / setting.clients
    terms = {
        "descent": -setting.rate * gradient2,
        "curvature": bend * growth * gradient2,
        "heterogeneity": bend * share * constants.c_g * constants.sigma_h2,
        "noise": bend * share * constants.sigma_g2,
    }
    return step_bound("B2, one round", terms, gap=gap, rate=setting.rate, caps=None)


def b2(constants: Constants, setting: Setting, *, gap: float, kind: Kind = "gaussian") -> Bound:
    """Returns the bound on the squared gradient for one local step, given the gap f(theta^0) - f*.

    2 (f0 - f*) / (eta T) + eta L (gamma / N) (c_g sigma_h2 + sigma_g2). It does not know d, and falls with N.

    Args:
      constants: of the losses; Assumption 1 must hold on every step.
      setting: of the run, with steps = 1; mu is taken as 0, which is exact on quadratics.
      gap: f(theta^0) - f*.
      kind: sphere or gaussian directions; the printed gamma does not give a bound.

    Raises:
      ConfigError: more than one local step, or the printed gamma.

    Source: bound B2 of docs/theory.md.
    """
    _check_b2(setting, kind)
    share = gamma(constants, directions=setting.directions, kind=kind) / setting.clients
    scale = setting.rate * constants.smoothness * share
    terms = {
        "initial gap": 2 * gap / (setting.rate * setting.rounds),
        "heterogeneity": scale * constants.c_g * constants.sigma_h2,
        "noise": scale * constants.sigma_g2,
    }
    caps = b2_caps(constants, clients=setting.clients, directions=setting.directions, kind=kind)
    return global_bound("B2", terms, gap=gap, smoothness=constants.smoothness, rate=setting.rate, caps=caps)


def _check_b2(setting: Setting, kind: Kind) -> None:
    if setting.steps != 1:
        raise ConfigError(f"B2 is for one local step, got steps={setting.steps}; ask for B1.")
    if kind == "paper":
        raise ConfigError('B2 does not hold with the printed gamma, got kind="paper"; ask for "gaussian" or "sphere".')
