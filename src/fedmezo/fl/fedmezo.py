"""FedMeZO (Ling et al., arXiv:2402.05926): local two-point descent on every client, then the mean of the walks."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fedmezo.errors import RunError
from fedmezo.fl.aggregate import Weighting, uniform_weights
from fedmezo.fl.algorithm import Algorithm, Reply, Task
from fedmezo.fl.walk import take_walks, walk_of
from fedmezo.zo.estimate import Estimator, robust_scale
from fedmezo.zo.noise import Law, derive_seed
from fedmezo.zo.seedsum import Update

__all__ = ["Decay", "Settings", "State", "fedmezo"]

Decay = Literal["constant", "linear", "cosine"]
RateHook = Callable[["State", int], float]
# The scale of the clip may rise by 2 % a round, to four times its lowest, and fall by 10 %. A diverging run
# shows slopes ten times larger within a few rounds; a clip that followed them would let it go.
_RISE, _FALL, _MOST = 1.02, 0.9, 4.0


@dataclass(frozen=True)
class Settings:
    """The numbers of a run; the defaults of `mu`, `steps` and `directions` are the paper's.

    Attributes:
      rate: learning rate eta of the first round.
      mu: perturbation scale.
      steps: local steps H.
      directions: directions averaged per step, n.
      clip: slopes are limited to this many robust scales; inf gives the paper's plain method.
      decay: how the rate falls over `rounds`: constant | linear | cosine.
      rounds: number of rounds T, used by the decay only.
      law: law of the directions.
      estimator: two-point | forward | forward-half.
      dense: clients send the walk written out instead of its scalars.
    """

    rate: float
    mu: float = 1e-3
    steps: int = 30
    directions: int = 1
    clip: float = 3.0
    decay: Decay = "constant"
    rounds: int = 1
    law: Law = "gaussian"
    estimator: Estimator = "two-point"
    dense: bool = False


@dataclass(frozen=True)
class State:
    """What the server remembers between rounds, apart from the model.

    Attributes:
      round: rounds done.
      scale: running scale of the slopes, which sets the clip in force; 0 before the first round.
      lowest: lowest running scale so far; 0 before the first round.
      slowed: factor on every rate, lowered by guards.
    """

    round: int = 0
    scale: float = 0.0
    lowest: float = 0.0
    slowed: float = 1.0


def fedmezo(
    settings: Settings,
    *,
    seed: int,
    cohort: int,
    weights: Weighting = uniform_weights,
    client_rate: RateHook = lambda state, client: 1.0,
) -> Algorithm[State]:
    """Returns FedMeZO as an algorithm.

    Args:
      settings: the numbers of the run.
      seed: the run's seed; names every direction and every cohort.
      cohort: clients per round, drawn without replacement.
      weights: replies -> weight of each, summing to 1.
      client_rate: (state, client) -> factor on that client's rate, for personalised rates.
    """

    def task(state: State, client: int) -> Task:
        rate = settings.rate * state.slowed * _decayed(settings, state.round) * client_rate(state, client)
        return Task(
            state.round,
            client,
            seed,
            rate,
            settings.mu,
            settings.steps,
            settings.directions,
            clip=_clip(settings, state),
            multiple=settings.clip if math.isfinite(settings.clip) else 1.0,
            law=settings.law,
            estimator=settings.estimator,
            dense=settings.dense,
        )

    def plan(state: State, clients: Sequence[int]) -> list[Task]:
        drawn = random.Random(derive_seed("cohort", seed, state.round)).sample(sorted(clients), cohort)
        return [task(state, client) for client in sorted(drawn)]

    def aggregate(state: State, replies: Sequence[Reply]) -> tuple[State, Update]:
        ordered = _checked(state, settings, replies)
        parts = tuple(reply.delta or walk_of(task(state, reply.client), reply.slopes) for reply in ordered)
        scale = robust_scale([slope for reply in ordered for slope in reply.slopes])
        scale = _follow(state, scale)
        lowest = min(state.lowest or scale, scale)
        update = Update(parts, tuple(weights(ordered)) if ordered else ())
        return replace(state, round=state.round + 1, scale=scale, lowest=lowest), update

    def slow_down(state: State, factor: float) -> State:
        return replace(state, slowed=state.slowed * factor)

    return Algorithm(State, plan, take_walks, aggregate, slow_down)


def _decayed(settings: Settings, round_number: int) -> float:
    done = min(round_number / settings.rounds, 1.0)
    if settings.decay == "linear":
        return 1 - done
    return (1 + math.cos(math.pi * done)) / 2 if settings.decay == "cosine" else 1.0


def _clip(settings: Settings, state: State) -> float:
    """Returns the limit on |slope| in force; 0 when no scale is known yet."""
    return math.inf if math.isinf(settings.clip) else settings.clip * state.scale


def _follow(state: State, seen: float) -> float:
    """Returns the running scale after a round whose slopes had the robust scale `seen` (0: none was finite)."""
    if state.scale == 0 or seen == 0:
        return state.scale or seen
    return min(max(seen, _FALL * state.scale), _RISE * state.scale, _MOST * state.lowest)


def _checked(state: State, settings: Settings, replies: Sequence[Reply]) -> list[Reply]:
    ordered = sorted(replies, key=lambda reply: reply.client)
    clients = [reply.client for reply in ordered]
    if len(set(clients)) < len(clients):
        raise RunError(f"Round {state.round}: a client replied twice (clients {clients}).")
    for reply in ordered:
        if reply.round != state.round or len(reply.slopes) != settings.steps * settings.directions:
            raise RunError(
                f"Round {state.round}: client {reply.client} sent {len(reply.slopes)} slopes for round {reply.round}, "
                f"expected {settings.steps * settings.directions}."
            )
    return ordered
