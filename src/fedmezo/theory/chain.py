"""The steps of the proof, one function each: as printed in the appendix, as printed in the main text, and corrected.

They are here to be compared with measurements, one inequality at a time.
"""

import math
from typing import Literal

from fedmezo.theory.caps import b1_growth
from fedmezo.theory.constants import Constants, Setting, Variant, counted_clients, sigma_tilde2

__all__ = [
    "Step",
    "averaging_factor",
    "drift_bound",
    "estimate_bound",
    "estimate_constant",
    "mean_gradient_bound",
    "smoothing_bias",
    "smoothing_gap",
]

Step = Variant | Literal["corrected"]


def smoothing_bias(constants: Constants, *, mu: float) -> float:
    """Returns mu L sqrt(d), an upper bound on |grad F_mu - grad F|, the bias of the estimate.

    F_mu(theta) = E F(theta + mu z) is the loss whose gradient the estimate has as its mean (erratum E2). The bias is
    0 on quadratics. Gaussian or sphere.

    Source: in the place of Lemma 2.2.
    """
    return mu * constants.smoothness * math.sqrt(constants.dim)


def smoothing_gap(constants: Constants, *, mu: float) -> float:
    """Returns mu^2 L d / 2, an upper bound on |F_mu - F| (erratum E2)."""
    return mu**2 * constants.smoothness * constants.dim / 2


def mean_gradient_bound(constants: Constants, *, clients: int, gradient2: float, variant: Step = "corrected") -> float:
    """Returns the bound on T1 = |mean of the clients' gradients|^2, given |grad f|^2.

    Corrected: T1 is |grad f|^2, because the mean of the clients' gradients is grad f. The printed values are upper
    bounds too, but T1 enters Eq. 16 with a minus sign, where only a lower bound helps (erratum E1).

    Source: Eq. 34 (i.i.d.), Eq. 50 (appendix), Eq. 23 (main text).
    """
    if variant == "corrected":
        return gradient2
    if constants.identical:
        return 2 * gradient2
    counted = counted_clients(clients, variant=variant)
    return 2 * (counted + constants.c_h) / counted * gradient2 + 2 * constants.sigma_h2 / counted


def averaging_factor(*, clients: int, steps: int, variant: Step = "corrected") -> float:
    """Returns c in E|(1/N) sum_i sum_k e|^2 <= c sum_i sum_k E|e|^2 over N clients and H steps.

    Corrected: H / N, an equality for equal vectors. The printed 1 / N^2 and 1 / N lack N H and H (erratum E7).

    Source: Eq. 35 (appendix), Eq. 17 (main text).
    """
    if variant == "corrected":
        return steps / clients
    return 1 / (clients * counted_clients(clients, variant=variant))


def estimate_constant(constants: Constants, *, mu: float) -> float:
    """Returns B = mu^2 L^2 d (d + 2) (d + 4) / 2, what mu adds to E|e|^2 with Gaussian directions.

    Source: bound B1 of docs/theory.md.
    """
    d = constants.dim
    return mu**2 * constants.smoothness**2 * d * (d + 2) * (d + 4) / 2


def estimate_bound(constants: Constants, *, mu: float, batch_gradient2: float, variant: Step = "corrected") -> float:
    """Returns the bound on E|e|^2 of one estimate (n = 1), given E|grad F|^2.

    Corrected: 2 (d + 2) E|grad F|^2 + B; the truth is (d + 2) E|grad F|^2 on quadratics. Both printed versions divide
    by d^2, a sphere's lemma on Gaussian directions (erratum E8).

    Source: Eqs. 18 and 37.
    """
    d = constants.dim
    if variant == "corrected":
        return 2 * (d + 2) * batch_gradient2 + estimate_constant(constants, mu=mu)
    return (2 * d * batch_gradient2 + mu**2 * constants.smoothness**2 * d**2 / 2) / d**2


def drift_bound(constants: Constants, setting: Setting, *, gradient2: float, variant: Step = "corrected") -> float:
    """Returns the bound on sum_k E|theta_i^(t,k) - theta^t|^2, averaged over clients, given |grad f(theta^t)|^2.

    Corrected: (2/3) eta^2 H^3 M, with M = q (1 + c_h) |grad f|^2 + q sigma_h2 + 2 (d + 2) sigma_g2 + B; it needs
    eta <= 1 / (H L sqrt(q)). Printed: C1 / C0 or C2 / C0, inf where C0 is not positive. The printed drift uses Eq. 37
    without its 1 / d^2 (erratum E8), so the two halves of the proof differ in scale by d^2.

    Source: Eqs. 22, 45 and 59; bound B1 of docs/theory.md.
    """
    d, smooth, c_g = constants.dim, constants.smoothness, constants.c_g
    reach = setting.rate**2 * setting.steps**3
    if variant == "corrected":
        growth = b1_growth(constants)
        noise = growth * constants.sigma_h2 + 2 * (d + 2) * constants.sigma_g2
        moment = growth * (1 + constants.c_h) * gradient2 + noise + estimate_constant(constants, mu=setting.mu)
        return 2 / 3 * reach * moment
    c_0 = 1 - 3 * c_g * d * (setting.rate * setting.steps * smooth) ** 2
    c_1 = 2 * c_g * d * (1 + constants.c_h) * reach * gradient2
    c_1 += 2 / 3 * d * sigma_tilde2(constants) * reach + setting.mu**2 * smooth**2 * d**2 * reach / 6
    return c_1 / c_0 if c_0 > 0 else math.inf
