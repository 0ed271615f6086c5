"""A bound as a record: named terms, their total, and the reasons for which it says nothing."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedmezo.theory.caps import Caps

__all__ = ["Bound", "global_bound", "step_bound"]


@dataclass(frozen=True)
class Bound:
    """An upper bound, term by term, in the units of what it bounds.

    Attributes:
      name: theorem or corollary, with its version.
      quantity: what is bounded, in the paper's symbols.
      terms: term by term; printed minus signs are kept.
      reasons: why the bound says nothing, one sentence each, the gravest first; () when it says something.
    """

    name: str
    quantity: str
    terms: Mapping[str, float]
    reasons: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """The sum of the terms. It is never clipped: a negative bound on a square stays negative."""
        return sum(self.terms.values())

    @property
    def vacuous(self) -> bool:
        """Whether the bound says nothing: it is impossible, its premise fails, or it is known without it."""
        return bool(self.reasons)

    @property
    def reason(self) -> str:
        """The gravest reason for which the bound says nothing, one sentence; "" when it says something."""
        return self.reasons[0] if self.reasons else ""


def step_bound(name: str, terms: Mapping[str, float], *, gap: float, rate: float, caps: Caps | None) -> Bound:
    """Returns a bound on E f(theta^{t+1}) - f(theta^t).

    Args:
      name: of the bound.
      terms: term by term.
      gap: f(theta^t) - f*; inf when unknown. No step can descend further.
      rate: the rate it is evaluated at.
      caps: what the theorem allows; None when it holds for every rate.
    """
    bare = Bound(name, "E f(theta^{t+1}) - f(theta^t)", terms)
    reasons = []
    if not bare.total >= -gap:
        reasons.append(f"It promises a change of {bare.total:.3g}, but the loss can fall by {gap:.3g} at most.")
    return Bound(name, bare.quantity, terms, (*reasons, *_above(rate, caps)))


def global_bound(
    name: str, terms: Mapping[str, float], *, gap: float, smoothness: float, rate: float, caps: Caps
) -> Bound:
    """Returns a bound on E|grad f(theta^t)|^2 averaged over t < T, and so on the smallest of them.

    It says nothing when it is not positive, when the rate is above its cap, or when it is no better than
    2 L (f(theta^0) - f*), which |grad f(theta^0)|^2 meets before the first step, by smoothness alone.

    Args:
      name: of the bound.
      terms: term by term.
      gap: f(theta^0) - f*.
      smoothness: L.
      rate: the rate it is evaluated at.
      caps: what the theorem allows.
    """
    bare = Bound(name, "mean over t < T of E|grad f(theta^t)|^2", terms)
    reasons, known = [], 2 * smoothness * gap
    if not (bare.total > 0 or bare.total == gap == 0):
        reasons.append(f"It bounds a square by {bare.total:.3g}, which is not positive.")
    reasons.extend(_above(rate, caps))
    if bare.total >= known > 0:
        reasons.append(f"It is no better than 2 L (f0 - f*) = {known:.3g}, which holds before the first step.")
    return Bound(name, bare.quantity, terms, tuple(reasons))


def _above(rate: float, caps: Caps | None) -> list[str]:
    """Returns the sentence that the rate is above its cap; nothing when it is not."""
    if caps is None or caps.allow(rate):
        return []
    return [f"The rate {rate:.3g} is above the cap {caps.rate:.3g} = {caps.binding.formula}."]
