"""How large a rate each theorem allows."""

import math
from dataclasses import dataclass

from fedmezo.theory.constants import Constants, Kind, Variant, counted_clients, gamma

__all__ = ["Cap", "Caps", "b1_caps", "b1_growth", "b2_caps", "b2_growth", "paper_caps"]


@dataclass(frozen=True)
class Cap:
    """One condition on the rate: its formula in the paper's symbols, and its value."""

    formula: str
    value: float


@dataclass(frozen=True)
class Caps:
    """All conditions that one theorem puts on the rate."""

    caps: tuple[Cap, ...]

    @property
    def binding(self) -> Cap:
        """The smallest cap, the one that decides."""
        return min(self.caps, key=lambda cap: cap.value)

    @property
    def rate(self) -> float:
        """The largest rate that meets every condition."""
        return self.binding.value

    def allow(self, rate: float) -> bool:
        """Returns whether the rate meets every condition; a hair is left to rounding."""
        return rate <= self.rate * (1 + 1e-12)


def paper_caps(constants: Constants, *, clients: int, steps: int, variant: Variant = "paper_appendix") -> Caps:
    """Returns the three caps of Theorems 3.1 and 3.4.

    The main text prints the second cap with N too, but its own step from Eq. 26 to Theorem 3.4 needs it with N = 1,
    as `variant="paper_main"` has it (erratum E11).

    Source: Eqs. 7 and 11.
    """
    scale = 3 * steps * constants.smoothness
    counted = counted_clients(clients, variant=variant)
    return Caps(
        (
            Cap("1 / (3 H L sqrt(c_g d))", 1 / (scale * math.sqrt(constants.c_g * constants.dim))),
            Cap("N / (3 H L c_g)", counted / (scale * constants.c_g)),
            Cap("1 / H^2", 1 / steps**2),
        )
    )


def b1_growth(constants: Constants) -> float:
    """Returns q = 6 (d + 2) c_g: E|e|^2 <= q (L^2 drift + (1 + c_h) |grad f|^2 + sigma_h2) + what mu and batches add.

    Source: bound B1 of docs/theory.md.
    """
    return 6 * (constants.dim + 2) * constants.c_g


def b1_caps(constants: Constants, *, steps: int) -> Caps:
    """Returns the two caps of B1.

    The second always binds, because 4 q > sqrt(q) for q >= 18; the first is what the drift lemma alone needs.

    Source: bound B1 of docs/theory.md.
    """
    growth, scale = b1_growth(constants), steps * constants.smoothness
    return Caps(
        (
            Cap("1 / (H L sqrt(q))", 1 / (scale * math.sqrt(growth))),
            Cap("1 / (4 H L q (1 + c_h))", 1 / (4 * scale * growth * (1 + constants.c_h))),
        )
    )


def b2_growth(constants: Constants, *, clients: int, directions: int = 1, kind: Kind = "gaussian") -> float:
    """Returns 1 + c_g (1 + c_h) gamma / N, the factor on |grad f|^2 in B2's second-order term.

    Source: bound B2 of docs/theory.md.
    """
    factor = gamma(constants, directions=directions, kind=kind)
    return 1 + constants.c_g * (1 + constants.c_h) * factor / clients


def b2_caps(constants: Constants, *, clients: int, directions: int = 1, kind: Kind = "gaussian") -> Caps:
    """Returns the one cap of B2.

    Source: bound B2 of docs/theory.md.
    """
    growth = b2_growth(constants, clients=clients, directions=directions, kind=kind)
    return Caps((Cap("1 / (L (1 + c_g (1 + c_h) gamma / N))", 1 / (constants.smoothness * growth)),))
