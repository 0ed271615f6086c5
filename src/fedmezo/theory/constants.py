"""What the theory starts from, as two records, and the rank constants that follow from them."""

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedmezo.errors import ConfigError

__all__ = [
    "Constants",
    "Kind",
    "Setting",
    "Variant",
    "c_h_tilde",
    "capital_gamma",
    "capital_gamma_tilde",
    "counted_clients",
    "for_batch",
    "gamma",
    "norm_ratio",
    "sigma_tilde2",
    "zeta",
]

# Which directions z a constant is for; "paper" is the printed form, which is right for none.
Kind = Literal["paper", "sphere", "gaussian"]
# The appendix and the main text differ by factors of N (erratum E11). The theorems' text follows the appendix.
Variant = Literal["paper_appendix", "paper_main"]


@dataclass(frozen=True)
class Constants:
    """What Assumptions 1 to 6 say about the losses.

    Attributes:
      dim: number of trained scalars, d.
      effective_rank: r, an upper bound on tr(H) / |H|op of a matrix H above the Hessian of f (Assumption 1).
      smoothness: L, of every client's mini-batch loss (Assumption 3).
      c_g: factor >= 1 in E|grad F_i|^2 <= c_g |grad f_i|^2 + sigma_g2 (Assumption 4).
      sigma_g2: the constant there.
      c_h: factor in |grad f - grad f_i|^2 <= c_h |grad f|^2 + sigma_h2 (Assumption 6).
      sigma_h2: the constant there. Both 0 is the i.i.d. case (Assumption 5).

    Raises:
      ConfigError: a number is out of its range or not finite.
    """

    dim: int
    effective_rank: float
    smoothness: float
    c_g: float = 1.0
    sigma_g2: float = 0.0
    c_h: float = 0.0
    sigma_h2: float = 0.0

    def __post_init__(self) -> None:
        """Checks every number's range."""
        for name in ("dim", "effective_rank", "c_g"):
            _expect(name, getattr(self, name), least=1)
        for name in ("sigma_g2", "c_h", "sigma_h2"):
            _expect(name, getattr(self, name), least=0)
        _expect_positive("smoothness", self.smoothness)

    @property
    def identical(self) -> bool:
        """Whether all clients have the same loss (Assumption 5)."""
        return self.c_h == 0 and self.sigma_h2 == 0


@dataclass(frozen=True)
class Setting:
    """What the user chooses.

    Attributes:
      clients: N, all of them in every round, with weight 1/N each.
      steps: local steps per round, H.
      rounds: T.
      rate: learning rate eta, of the zeroth-order step itself.
      mu: perturbation scale; 0 stands for its limit.
      directions: directions averaged per step, n.

    Raises:
      ConfigError: a number is out of its range or not finite.
    """

    clients: int
    steps: int
    rounds: int
    rate: float
    mu: float
    directions: int = 1

    def __post_init__(self) -> None:
        """Checks every number's range."""
        for name in ("clients", "steps", "rounds", "directions"):
            _expect(name, getattr(self, name), least=1)
        _expect("mu", self.mu, least=0)
        _expect_positive("rate", self.rate)


def for_batch(constants: Constants, batch: int) -> Constants:
    """Returns the constants for batches of `batch` examples, given those for single examples.

    A mean of b independent gradients has 1/b of the variance, so c_g - 1 and sigma_g2 shrink by b. Drawing without
    replacement only helps.
    """
    _expect("batch", batch, least=1)
    return replace(constants, c_g=1 + (constants.c_g - 1) / batch, sigma_g2=constants.sigma_g2 / batch)


def gamma(constants: Constants, *, directions: int = 1, kind: Kind = "gaussian") -> float:
    """Returns gamma: how much larger curvature makes the second-order term than it is for a gradient step.

    E[e' H e] <= gamma * |H|op * E|grad F|^2 for the estimate e. Gaussian: 1 + (r + 1) / n. Sphere of radius sqrt(d):
    1 + (d r + d - 2) / (n (d + 2)). The printed form lacks the 1 (erratum E3).

    Source: Lemma 2.3, after Eq. 6.
    """
    d, r = constants.dim, constants.effective_rank
    if kind == "gaussian":
        return 1 + (r + 1) / directions
    printed = (d * r + d - 2) / (directions * (d + 2))
    return printed if kind == "paper" else 1 + printed


def norm_ratio(constants: Constants, *, directions: int = 1, kind: Kind = "gaussian") -> float:
    """Returns E|e|^2 / E|grad F|^2 for the estimate e, as mu goes to 0.

    (d + n + 1) / n for Gaussian directions. The printed (d + n - 1) / n is for the sphere (erratum E4).

    Source: Lemma C.2, Eq. 33.
    """
    return (constants.dim + directions + (1 if kind == "gaussian" else -1)) / directions


def zeta(constants: Constants, *, directions: int = 1, kind: Kind = "gaussian") -> float:
    """Returns zeta, the factor that puts E|e|^2 in the place of E|grad F|^2 / gamma; 1 / (gamma d) as printed, n = 1.

    Raises:
      ConfigError: the printed gamma is 0, which it is for d = r = 1 (erratum E3).

    Source: Lemma 2.3, after Eq. 6.
    """
    factor = gamma(constants, directions=directions, kind=kind)
    if factor == 0:
        raise ConfigError('The printed gamma is 0 for dim = effective_rank = 1, got kind="paper"; ask for "gaussian".')
    return 1 / (factor * norm_ratio(constants, directions=directions, kind=kind))


def capital_gamma(constants: Constants, *, directions: int = 1, kind: Kind = "gaussian") -> float:
    """Returns Gamma = 1 / gamma - zeta / d, of order 1 / r.

    Source: Corollary 3.2.
    """
    return capital_gamma_tilde(constants, clients=1, directions=directions, kind=kind)


def capital_gamma_tilde(constants: Constants, *, clients: int, directions: int = 1, kind: Kind = "gaussian") -> float:
    """Returns Gamma-tilde = 1 / (gamma N) - zeta / d, of order 1 / (r N), not 1 / r as printed (erratum E12).

    Not positive once N >= d^2; then the printed corollary says nothing.

    Source: Corollary 3.5.
    """
    per_client = 1 / (gamma(constants, directions=directions, kind=kind) * clients)
    return per_client - zeta(constants, directions=directions, kind=kind) / constants.dim


def counted_clients(clients: int, *, variant: Variant) -> int:
    """Returns the N that a version of the proof counts: the main text's is the appendix's with N = 1.

    Source: Eqs. 17 to 26 against Eqs. 35 to 61 (erratum E11).
    """
    return clients if variant == "paper_appendix" else 1


def c_h_tilde(constants: Constants, *, clients: int, variant: Variant = "paper_appendix") -> float:
    """Returns c-tilde_h: c_h + N in Theorem 3.4 and the appendix, c_h + 1 in the main text (erratum E11)."""
    return constants.c_h + counted_clients(clients, variant=variant)


def sigma_tilde2(constants: Constants) -> float:
    """Returns sigma-tilde^2 = 3 c_g sigma_h2 + sigma_g2.

    Source: Theorem 3.4.
    """
    return 3 * constants.c_g * constants.sigma_h2 + constants.sigma_g2


def _expect(name: str, value: float, *, least: float) -> None:
    if not (math.isfinite(value) and value >= least):
        raise ConfigError(f"{name}: expected a finite number >= {least}, got {value}.")


def _expect_positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(f"{name}: expected a finite number > 0, got {value}.")
