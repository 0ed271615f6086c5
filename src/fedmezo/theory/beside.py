"""All bounds of one setting beside each other: what holds first, then what is printed."""

import math

from fedmezo.theory.bound import Bound
from fedmezo.theory.constants import Constants, Setting, Variant
from fedmezo.theory.corrected import b1, b1_step, b2, b2_step
from fedmezo.theory.printed import corollary_3_2, corollary_3_5, theorem_3_1, theorem_3_4

__all__ = ["global_bounds", "step_bounds"]

_PRINTED: tuple[Variant, ...] = ("paper_appendix", "paper_main")


def step_bounds(
    constants: Constants, setting: Setting, *, gradient2: float, gap: float = math.inf
) -> tuple[Bound, ...]:
    """Returns the bounds on a round's change in loss: B1, B2 (one local step only), then the theorem as printed.

    The theorem is 3.1 for i.i.d. constants and 3.4 otherwise, in the appendix's and the main text's version.
    """
    theorem = theorem_3_1 if constants.identical else theorem_3_4
    held = [b1_step(constants, setting, gradient2=gradient2, gap=gap)]
    if setting.steps == 1:
        held.append(b2_step(constants, setting, gradient2=gradient2, gap=gap))
    printed = (theorem(constants, setting, gradient2=gradient2, gap=gap, variant=v) for v in _PRINTED)
    return (*held, *printed)


def global_bounds(constants: Constants, setting: Setting, *, gap: float) -> tuple[Bound, ...]:
    """Returns the bounds on the squared gradient: B1, B2 (one local step only), then the corollary as printed.

    The corollary is 3.2 for i.i.d. constants and 3.5 otherwise, in the appendix's and the main text's version.
    """
    corollary = corollary_3_2 if constants.identical else corollary_3_5
    held = [b1(constants, setting, gap=gap)]
    if setting.steps == 1:
        held.append(b2(constants, setting, gap=gap))
    return (*held, *(corollary(constants, setting, gap=gap, variant=v) for v in _PRINTED))
