"""Personalised learning rates (Proposition 3.7 of arXiv:2402.05926): eta_i = eta_0 (1 + alpha Phi_i).

Phi_i in [-1, 1] says how far a client stands out among those heard of lately. The server computes it from replies
alone, so it is rebuilt from a journal like any other state. Its motivation in the paper rests on a sign error (E1 of
docs/theory.md): take it as a heuristic, and compare with the controls (random, shuffled).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

import numpy as np

from fedmezo.errors import ConfigError
from fedmezo.fl.algorithm import Algorithm, Reply, Task
from fedmezo.fl.phi import Normaliser, dealt, half_deviations, mean_deviations, normalised, random_phi, smoothed
from fedmezo.fl.signals import (
    Values,
    distances,
    gradient_gaps,
    losses,
    parts_of,
    scalar_distances,
    squared_gradients,
)
from fedmezo.fl.walk import walk_of
from fedmezo.fl.whole import own
from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params
from fedmezo.zo.seedsum import DenseDelta, Update, Walk

__all__ = [
    "Mode", "Personal", "PersonalState", "Signal", "factor", "measured", "phi_in_force", "phi_of",
    "with_personal_rates",
]  # fmt: skip

Signal = Literal["round-loss", "five-round-loss", "update-difference", "heterogeneity", "random"]
Mode = Literal["multiplicative", "additive"]
_WINDOWS = {"five-round-loss": 5}
_RELATIVE = ("update-difference", "heterogeneity")


@dataclass(frozen=True)
class Personal:
    """How clients' rates differ; the defaults are the paper's, clamped.

    Attributes:
      signal: what Phi is made of.
      alpha: gain of the multiplicative mode, eta_0 (1 + alpha Phi).
      mode: multiplicative (the paper) | additive (its code, eta_0 + delta Phi).
      delta: gain of the additive mode, in units of the rate. Decay and guards scale it with eta_0.
      normaliser: how deviations become Phi; see `normalised`.
      window: rounds a signal is averaged over, which is also the warm-up at eta_0; None for the signal's own (5 or 1).
      smoothing: share of the last Phi that is kept, in [0, 1).
      lowest: smallest factor on the rate, in [0, 1].
      highest: largest factor, at least 1.
      cap: largest rate, of whatever client; inf for none.
      exact: update-difference by writing the updates out; heterogeneity from shared directions only.
      compat: the numbers of the paper's code: values pass through float16, distances are exact.
      shuffle: a control: every Phi goes to a client drawn at random among those that have one.

    Raises:
      ConfigError: a number is out of range, or shuffle has nothing to shuffle.
    """

    signal: Signal
    alpha: float = 0.5
    mode: Mode = "multiplicative"
    delta: float = 5e-6
    normaliser: Normaliser = "maxabs"
    window: int | None = None
    smoothing: float = 0.0
    lowest: float = 0.25
    highest: float = 4.0
    cap: float = math.inf
    exact: bool = False
    compat: bool = False
    shuffle: bool = False

    def __post_init__(self) -> None:
        """Checks every number."""
        if not 0 <= self.lowest <= 1 <= self.highest:
            raise ConfigError(
                f"Factors on the rate must be 0 <= lowest <= 1 <= highest, got {self.lowest} and {self.highest}."
            )
        if not (math.isfinite(self.alpha) and math.isfinite(self.delta) and self.cap > 0):
            raise ConfigError(f"alpha, delta and cap: got {self.alpha}, {self.delta}, {self.cap}; cap must be above 0.")
        if self.rounds < 1 or not 0 <= self.smoothing < 1:
            raise ConfigError(
                f"window must be at least 1 and smoothing in [0, 1), got {self.window} and {self.smoothing}."
            )
        if self.shuffle and self.signal == "random":
            raise ConfigError("Shuffling random rates gives random rates; set shuffle = false, or choose a signal.")

    @property
    def rounds(self) -> int:
        """The window in rounds."""
        return _WINDOWS.get(self.signal, 1) if self.window is None else self.window


S = TypeVar("S")


@dataclass(frozen=True)
class PersonalState(Generic[S]):
    """What the server remembers: bounded by the clients heard of in one window.

    Attributes:
      inner: the algorithm's own state.
      round: rounds done.
      seen: client -> value, one mapping for each round of the window, newest last.
      phi: client -> Phi, for the clients heard of; 0 for all others.
      factors: client -> what another wrapper multiplies its rate by; 1 for all others.
    """

    inner: S
    round: int = 0
    seen: tuple[Values, ...] = ()
    phi: Values = field(default_factory=dict)
    factors: Mapping[int, float] = field(default_factory=dict)


def with_personal_rates(
    algorithm: Algorithm[S],
    personal: Personal,
    *,
    seed: int,
    rate: float,
    params: Params | None = None,
    law: Law = "gaussian",
) -> Algorithm[PersonalState[S]]:
    """Returns the algorithm with a rate for each client: its own rate times `factor` of the client's Phi.

    Laws: equal signals give the bits of the algorithm itself; any number of clients, any cohort; wrappers compose, and
    their factors multiply.

    Args:
      algorithm: any algorithm; `update-difference` and `heterogeneity` need what its replies hold.
      personal: which signal, and how it acts.
      seed: the run's seed; names the draws of the controls.
      rate: eta_0, to which `delta` and `cap` are compared.
      params: names and shapes of what is trained, for exact distances of walks; only shapes are read.
      law: the directions' law, likewise.
    """

    def plan(state: PersonalState[S], clients: Sequence[int]) -> Sequence[Task]:
        phi = phi_in_force(state, personal, clients=clients, seed=seed)
        own = {c: factor(phi[c], personal, rate=rate) * state.factors.get(c, 1.0) for c in clients}
        return algorithm.plan(algorithm.with_factors(state.inner, own), clients)

    def aggregate(
        state: PersonalState[S], tasks: Sequence[Task], replies: Sequence[Reply]
    ) -> tuple[PersonalState[S], Update]:
        inner, update = algorithm.aggregate(state.inner, tasks, replies)
        ours, parts = own(replies), update.parts[: len(own(replies))]
        walked = _as_walks(Update(parts, update.weights[: len(parts)], update.round), tasks, ours)
        values = measured(personal, ours, walked, params=params, law=law)
        seen = (*state.seen, values)[-personal.rounds :]
        phi = smoothed(state.phi, phi_of(personal, seen), keep=personal.smoothing)
        return replace(state, inner=inner, round=state.round + 1, seen=seen, phi=phi), update

    def slow_down(state: PersonalState[S], by: float) -> PersonalState[S]:
        return replace(state, inner=algorithm.slow_down(state.inner, by))

    return Algorithm(
        lambda: PersonalState(algorithm.init()),
        plan,
        algorithm.client,
        aggregate,
        slow_down,
        lambda state, factors: replace(state, factors=factors),
        lambda state: algorithm.sums(state.inner),
        algorithm.gather,
    )


def _as_walks(update: Update, tasks: Sequence[Task], replies: Sequence[Reply]) -> Update:
    """Returns what the round added, as walks where there are slopes: a journal keeps no walk that was written out."""
    asked = {task.client: task for task in tasks}
    ordered = sorted(replies, key=lambda reply: reply.client)
    parts = [
        walk_of(asked[reply.client], reply.slopes) if reply.slopes and isinstance(part, DenseDelta) else part
        for reply, part in zip(ordered, update.parts, strict=True)
    ]
    return replace(update, parts=tuple(parts))


def measured(
    personal: Personal, replies: Sequence[Reply], update: Update, *, params: Params | None = None, law: Law = "gaussian"
) -> dict[int, float]:
    """Returns one round's value of the signal for each client that has one.

    Args:
      personal: which signal.
      replies: the round's replies.
      update: what they added to the model, one part per reply in client order.
      params: as in `with_personal_rates`.
      law: the directions' law.
    """
    if personal.signal == "random":
        return {}
    parts = parts_of(replies, update)
    walks = {client: part for client, part in parts.items() if isinstance(part, Walk)}
    if personal.signal == "heterogeneity":
        return gradient_gaps(replies, walks) if personal.exact else squared_gradients(replies)
    if personal.signal != "update-difference":
        return losses(replies)
    if len(walks) < len(parts) or personal.exact or personal.compat:
        found = dict(zip(parts, distances(list(parts.values()), params, law=law), strict=True))
        return {client: distance for client, distance in found.items() if math.isfinite(distance)}
    # The scale cancels in a comparison of distances.
    return dict(zip(walks, scalar_distances(list(walks.values()), dim=1), strict=True))


def phi_of(personal: Personal, seen: Sequence[Values]) -> dict[int, float]:
    """Returns client -> Phi from a window of values, for the clients in it; nobody's before the window is full."""
    if len(seen) < personal.rounds:
        return {}
    if personal.compat:
        found = normalised(half_deviations(seen), how=personal.normaliser)
        return {client: float(np.float16(phi)) for client, phi in found.items()}
    gaps = mean_deviations(seen, relative=personal.signal in _RELATIVE)
    return normalised(gaps, how=personal.normaliser)


def phi_in_force(state: PersonalState[S], personal: Personal, *, clients: Sequence[int], seed: int) -> dict[int, float]:
    """Returns the Phi of `clients` in the round to come: the signal's own, dealt, or drawn; 0 for those unheard of."""
    if personal.signal == "random":
        return {client: random_phi(seed, state.round, client) for client in clients}
    phi = dealt(state.phi, seed=seed, round=state.round) if personal.shuffle else state.phi
    return {client: phi.get(client, 0.0) for client in clients}


def factor(phi: float, personal: Personal, *, rate: float) -> float:
    """Returns what Phi multiplies the rate eta_0 = `rate` by, inside [lowest, highest] and under the cap.

    Source: Eq. 15 of arXiv:2402.05926; its code adds 5e-6 * Phi, the same for alpha = 0.5 at eta_0 = 1e-5.
    """
    gain = personal.alpha if personal.mode == "multiplicative" else personal.delta / rate
    return min(max(personal.lowest, min(personal.highest, 1 + gain * phi)), personal.cap / rate)
