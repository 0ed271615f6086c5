"""Which rate, which mu, how many rounds: what the paper recommends, and what the corrected bounds ask for."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedmezo.errors import ConfigError
from fedmezo.theory.caps import Caps, b1_caps, b2_caps, paper_caps
from fedmezo.theory.chain import estimate_constant
from fedmezo.theory.constants import Constants, Kind, Variant, c_h_tilde, gamma
from fedmezo.theory.corrected import b1_floor, b2_floor

__all__ = [
    "Advice",
    "PaperChoice",
    "adaptive_rate",
    "b1_advice",
    "b1_best_rate",
    "b2_advice",
    "b2_best_rate",
    "paper_choice",
    "paper_rate",
    "zo_rate",
]

# The share of the target that B1 leaves to mu. A smaller mu costs no rounds, so it need not be tuned.
_MU_SHARE = 0.1


@dataclass(frozen=True)
class PaperChoice:
    """The rate and mu of Corollaries 3.3 and 3.6, and whether the paper's own theorems allow them.

    Attributes:
      rate: eta = sqrt(N H / (r c T)), with c = 1 (i.i.d.) or c-tilde_h.
      mu: (c N H)^(1/4) / sqrt(r).
      caps: the conditions of Eqs. 7 and 11.
      rounds_needed: for each cap's formula, the rounds T from which on the rate meets it.
    """

    rate: float
    mu: float
    caps: Caps
    rounds_needed: Mapping[str, int]

    @property
    def allowed(self) -> bool:
        """Whether the rate meets every cap."""
        return self.caps.allow(self.rate)

    @property
    def min_rounds(self) -> int:
        """The rounds from which on the rate meets every cap."""
        return max(self.rounds_needed.values())


@dataclass(frozen=True)
class Advice:
    """What a corrected bound asks for to reach a target.

    Attributes:
      rate: learning rate.
      mu: largest perturbation scale; 0 where the bound is for mu -> 0.
      rounds: fewest rounds at that rate.
      binding: what keeps the rate from being larger: the cap's formula, or "noise".
    """

    rate: float
    mu: float
    rounds: int
    binding: str


def paper_choice(
    constants: Constants, *, clients: int, steps: int, rounds: int, variant: Variant = "paper_appendix"
) -> PaperChoice:
    """Returns the recommended rate and mu beside the caps they must meet, and the rounds at which they do.

    The rounds follow from rate <= cap: for the three caps they are 9 N H^3 L^2 c_g d / (r c), 9 H^3 L^2 c_g^2 /
    (N r c) and N H^5 / (r c) (erratum E10).

    Source: Corollaries 3.3 (i.i.d. constants) and 3.6; Eqs. 7 and 11.
    """
    spread = 1.0 if constants.identical else c_h_tilde(constants, clients=clients, variant=variant)
    squared = clients * steps / (constants.effective_rank * spread)
    caps = paper_caps(constants, clients=clients, steps=steps, variant=variant)
    return PaperChoice(
        rate=math.sqrt(squared / rounds),
        mu=(spread * clients * steps) ** 0.25 / math.sqrt(constants.effective_rank),
        caps=caps,
        rounds_needed={cap.formula: math.ceil(squared / cap.value**2 * (1 - 1e-12)) for cap in caps.caps},
    )


def paper_rate(
    constants: Constants, *, clients: int, steps: int, rounds: int, variant: Variant = "paper_appendix"
) -> dict[str, float]:
    """Returns the terms of the printed O() of Corollary 3.3 (i.i.d. constants) or 3.6, with every O as 1.

    A label, not a bound: substituting the recommended rate and mu into Eqs. 9 and 13 gives other orders (errata E9
    and E12). The last term is printed with c_h, in a summary with c-tilde_h; it is taken with c-tilde_h, because
    c_h may be 0.

    Source: Eqs. 10 and 14.
    """
    spread = 1.0 if constants.identical else c_h_tilde(constants, clients=clients, variant=variant)
    r, width = constants.effective_rank, clients * steps
    terms = {
        "rounds": r**1.5 / math.sqrt(spread * width * rounds),
        "perturbation": 1 / (constants.dim * math.sqrt(r * spread * width)),
    }
    return terms if constants.identical else terms | {"heterogeneity": -constants.sigma_h2 / (spread * clients)}


def b1_best_rate(constants: Constants, *, steps: int, rounds: int, gap: float) -> float:
    """Returns the rate at which B1 is smallest as mu goes to 0: min(cap, sqrt((f0 - f*) / (T L W)) / H).

    Source: bound B1 of docs/theory.md, W as in `b1_floor`.
    """
    cap, floor = b1_caps(constants, steps=steps).rate, constants.smoothness * b1_floor(constants)
    return min(cap, math.sqrt(gap / (rounds * floor)) / steps) if floor and gap else cap


def b2_best_rate(
    constants: Constants,
    *,
    clients: int,
    rounds: int,
    gap: float,
    directions: int = 1,
    kind: Kind = "gaussian",
) -> float:
    """Returns the rate at which B2 is smallest: min(cap, sqrt(2 (f0 - f*) N / (T L gamma (c_g sigma_h2 + sigma_g2)))).

    Source: bound B2 of docs/theory.md.
    """
    cap = b2_caps(constants, clients=clients, directions=directions, kind=kind).rate
    floor = b2_floor(constants, clients=clients, directions=directions, kind=kind)
    return min(cap, math.sqrt(2 * gap / (rounds * floor))) if floor and gap else cap


def b1_advice(constants: Constants, *, steps: int, gap: float, target: float) -> Advice:
    """Returns the rate, mu and fewest rounds with which B1 promises a mean squared gradient of at most `target`.

    A tenth of the target is left to mu; the rate is the one that needs the fewest rounds for the rest.

    Raises:
      ConfigError: the target is not positive.

    Source: bound B1 of docs/theory.md.
    """
    _expect_target(target)
    smooth, rest = constants.smoothness, (1 - _MU_SHARE) * target
    slope = 4 * smooth * steps * b1_floor(constants)
    rate, binding = _fastest(b1_caps(constants, steps=steps), rest, slope)
    unit = 4 * smooth**2 * constants.dim + 4 * rate * smooth * steps * estimate_constant(constants, mu=1.0)
    rounds = _rounds(4 * gap, rate * steps * (rest - rate * slope))
    return Advice(rate, math.sqrt(_MU_SHARE * target / unit), rounds, binding)


def b2_advice(
    constants: Constants,
    *,
    clients: int,
    gap: float,
    target: float,
    directions: int = 1,
    kind: Kind = "gaussian",
) -> Advice:
    """Returns the rate and fewest rounds with which B2 promises a mean squared gradient of at most `target`.

    Raises:
      ConfigError: the target is not positive.

    Source: bound B2 of docs/theory.md.
    """
    _expect_target(target)
    slope = b2_floor(constants, clients=clients, directions=directions, kind=kind)
    caps = b2_caps(constants, clients=clients, directions=directions, kind=kind)
    rate, binding = _fastest(caps, target, slope)
    return Advice(rate, 0.0, _rounds(2 * gap, rate * (target - rate * slope)), binding)


def zo_rate(constants: Constants, *, sgd_rate: float, directions: int = 1, kind: Kind = "gaussian") -> float:
    """Returns eta_sgd / gamma: the zeroth-order rate with the same per-step guarantee, gamma times slower.

    Source: Lemma C.1, read as in erratum E5.
    """
    return sgd_rate / gamma(constants, directions=directions, kind=kind)


def adaptive_rate(rate: float, *, alpha: float, index: float) -> float:
    """Returns eta_i = eta_0 (1 + alpha Phi_i).

    The index is in [-1, 1]. Its motivation falls with erratum E1, so take it as a heuristic. The paper's alpha of 5e-6
    only makes sense as an addition to the rate; multiplied, it is 0.5 (erratum E16).

    Source: Proposition 3.7, Eq. 15.
    """
    return rate * (1 + alpha * index)


def _fastest(caps: Caps, target: float, slope: float) -> tuple[float, str]:
    """Returns the rate that maximises rate * (target - rate * slope) below the caps, and what binds it."""
    if slope and target / (2 * slope) < caps.rate:
        return target / (2 * slope), "noise"
    return caps.rate, caps.binding.formula


def _rounds(gap: float, per_round: float) -> int:
    """Returns the fewest whole rounds; at least 1. A hair is left to rounding."""
    return max(1, math.ceil(gap / per_round * (1 - 1e-12)))


def _expect_target(target: float) -> None:
    if not (math.isfinite(target) and target > 0):
        raise ConfigError(f"target: expected a finite number > 0, got {target}.")
