"""Theorems 3.1 and 3.4 and Corollaries 3.2 and 3.5 as printed, term by term.

Their proofs are wrong (errata E1 and E3 to E8); they are evaluated here to be shown beside what holds. The default
version is the appendix's, which the theorems' text follows; the main text's is the same with N = 1 wherever the
appendix counts clients (erratum E11).
"""

import math
from typing import Literal

from fedmezo.theory.bound import Bound, global_bound, step_bound
from fedmezo.theory.caps import paper_caps
from fedmezo.theory.constants import (
    Constants,
    Kind,
    Setting,
    Variant,
    c_h_tilde,
    capital_gamma,
    capital_gamma_tilde,
    counted_clients,
    gamma,
    sigma_tilde2,
    zeta,
)

__all__ = ["corollary_3_2", "corollary_3_5", "descent", "lemma_2_3", "theorem_3_1", "theorem_3_4"]


def descent(
    constants: Constants,
    *,
    rate: float,
    gradient2: float,
    batch_gradient2: float,
    directions: int = 1,
    kind: Kind = "gaussian",
    rate_is: Literal["zo", "sgd"] = "zo",
) -> Bound:
    """Returns the bound on the change in loss of one central step, given |grad f|^2 and E|grad F|^2.

    With eta the zeroth-order step: -eta |grad f|^2 + eta^2 L gamma E|grad F|^2 / 2. With `rate_is="sgd"`, eta / gamma
    is the step that is taken, which gives Lemma C.1; `kind="paper"` gives it as printed (errata E3 and E5).

    Source: Lemma C.1, Eq. 32.
    """
    factor = gamma(constants, directions=directions, kind=kind)
    step = rate / factor if rate_is == "sgd" else rate
    terms = {
        "descent": -step * gradient2,
        "curvature": step**2 * constants.smoothness * factor * batch_gradient2 / 2,
    }
    return step_bound(f"Lemma C.1, gamma {kind}, rate {rate_is}", terms, gap=math.inf, rate=rate, caps=None)


def lemma_2_3(constants: Constants, *, rate: float, gradient2: float, estimate2: float, directions: int = 1) -> Bound:
    """Returns the printed bound on the change in loss of one central step, given |grad f|^2 and E|e|^2.

    It reads eta as the step that is taken, although it was proved for eta / gamma (erratum E5).

    Source: Lemma 2.3, Eq. 6.
    """
    factor = gamma(constants, directions=directions, kind="paper")
    size = zeta(constants, directions=directions, kind="paper")
    terms = {
        "descent": -rate * gradient2 / factor,
        "curvature": rate**2 * constants.smoothness * size * estimate2 / 2,
    }
    return step_bound("Lemma 2.3", terms, gap=math.inf, rate=rate, caps=None)


def theorem_3_1(
    constants: Constants,
    setting: Setting,
    *,
    gradient2: float,
    gap: float = math.inf,
    variant: Variant = "paper_appendix",
    kind: Kind = "paper",
) -> Bound:
    """Returns the printed i.i.d. bound on a round's change in loss.

    Args:
      constants: of the losses; c_h and sigma_h2 are not used.
      setting: of the run.
      gradient2: |grad f(theta^t)|^2.
      gap: f(theta^t) - f*, to notice an impossible descent; inf when unknown.
      variant: appendix, or main text without 1 / N.
      kind: which gamma and zeta.

    Source: Theorem 3.1, Eqs. 8 and 47.
    """
    size = zeta(constants, directions=setting.directions, kind=kind)
    slope = 2 * capital_gamma(constants, directions=setting.directions, kind=kind)
    width = counted_clients(setting.clients, variant=variant) * setting.steps
    scale = size * setting.rate * constants.smoothness
    terms = {
        "descent": -slope * setting.rate * gradient2,
        "noise": 2 * constants.sigma_g2 * scale / (width * constants.dim),
        "perturbation": scale * setting.mu**2 * constants.smoothness**2 / (2 * width),
    }
    caps = paper_caps(constants, clients=setting.clients, steps=setting.steps, variant=variant)
    return step_bound(f"Theorem 3.1, {variant}", terms, gap=gap, rate=setting.rate, caps=caps)


def corollary_3_2(
    constants: Constants,
    setting: Setting,
    *,
    gap: float,
    variant: Variant = "paper_appendix",
    kind: Kind = "paper",
) -> Bound:
    """Returns the printed i.i.d. bound on the squared gradient, given the gap f(theta^0) - f*.

    Source: Corollary 3.2, Eqs. 9 and 49.
    """
    size = zeta(constants, directions=setting.directions, kind=kind)
    factor = capital_gamma(constants, directions=setting.directions, kind=kind)
    width = counted_clients(setting.clients, variant=variant) * setting.steps
    terms = {
        "initial gap": _over(gap, 2 * setting.rate * setting.rounds * factor),
        "noise": _over(constants.sigma_g2 * size * constants.smoothness, width * constants.dim * factor),
        "perturbation": _over(size * setting.mu**2 * constants.smoothness**3, 4 * width * factor),
    }
    return _judged(f"Corollary 3.2, {variant}", terms, constants, setting, gap=gap, variant=variant)


def theorem_3_4(
    constants: Constants,
    setting: Setting,
    *,
    gradient2: float,
    gap: float = math.inf,
    variant: Variant = "paper_appendix",
    kind: Kind = "paper",
) -> Bound:
    """Returns the printed non-i.i.d. bound on a round's change in loss.

    c-tilde_h multiplies both parts of the bracket, as in Eq. 61; the print of Eq. 12 leaves it open. The last term
    rewards heterogeneity, which is the sign error E1.

    Args:
      constants: of the losses.
      setting: of the run.
      gradient2: |grad f(theta^t)|^2.
      gap: f(theta^t) - f*, to notice an impossible descent; inf when unknown.
      variant: appendix, or main text with c_h + 1 and without 1 / N.
      kind: which gamma and zeta.

    Source: Theorem 3.4, Eqs. 12 and 61.
    """
    size = zeta(constants, directions=setting.directions, kind=kind)
    counted = counted_clients(setting.clients, variant=variant)
    slope = 2 * capital_gamma_tilde(constants, clients=counted, directions=setting.directions, kind=kind)
    spread = c_h_tilde(constants, clients=setting.clients, variant=variant)
    width, scale = counted * setting.steps, size * setting.rate * constants.smoothness
    per_client = 2 / (gamma(constants, directions=setting.directions, kind=kind) * counted)
    terms = {
        "descent": -slope * spread * setting.rate * gradient2,
        "noise": 2 * sigma_tilde2(constants) * scale / (width * constants.dim),
        "perturbation": scale * setting.mu**2 * constants.smoothness**2 / (2 * width),
        "heterogeneity": -per_client * setting.rate * constants.sigma_h2,
    }
    caps = paper_caps(constants, clients=setting.clients, steps=setting.steps, variant=variant)
    return step_bound(f"Theorem 3.4, {variant}", terms, gap=gap, rate=setting.rate, caps=caps)


def corollary_3_5(
    constants: Constants,
    setting: Setting,
    *,
    gap: float,
    variant: Variant = "paper_appendix",
    kind: Kind = "paper",
) -> Bound:
    """Returns the printed non-i.i.d. bound on the squared gradient, given the gap f(theta^0) - f*.

    Source: Corollary 3.5, Eqs. 13 and 62.
    """
    size = zeta(constants, directions=setting.directions, kind=kind)
    counted = counted_clients(setting.clients, variant=variant)
    factor = capital_gamma_tilde(constants, clients=counted, directions=setting.directions, kind=kind)
    factor *= c_h_tilde(constants, clients=setting.clients, variant=variant)
    width = counted * setting.steps
    rank = gamma(constants, directions=setting.directions, kind=kind)
    terms = {
        "initial gap": _over(gap, 2 * factor * setting.rate * setting.rounds),
        "noise": _over(sigma_tilde2(constants) * size * constants.smoothness, factor * width * constants.dim),
        "perturbation": _over(size * setting.mu**2 * constants.smoothness**3, 4 * factor * width),
        "heterogeneity": _over(-constants.sigma_h2, factor * rank * counted),
    }
    return _judged(f"Corollary 3.5, {variant}", terms, constants, setting, gap=gap, variant=variant)


def _judged(
    name: str, terms: dict[str, float], constants: Constants, setting: Setting, *, gap: float, variant: Variant
) -> Bound:
    caps = paper_caps(constants, clients=setting.clients, steps=setting.steps, variant=variant)
    return global_bound(name, terms, gap=gap, smoothness=constants.smoothness, rate=setting.rate, caps=caps)


def _over(above: float, below: float) -> float:
    """Returns above / below; inf of its sign where Gamma is 0, and 0 stays 0."""
    if below == 0:
        return math.copysign(math.inf, above) if above else 0.0
    return above / below
