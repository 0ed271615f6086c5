"""FedMeZO (Ling et al., arXiv:2402.05926): local two-point descent on every client, then the mean of the walks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from fedmezo.fl.aggregate import Weighting, uniform_weights, weights_of
from fedmezo.fl.algorithm import Algorithm, Reply, Task
from fedmezo.fl.cohort import Decay, answers, decayed, draw_cohort
from fedmezo.fl.walk import take_walks, walk_of
from fedmezo.fl.whole import own
from fedmezo.zo.coding import Coding
from fedmezo.zo.estimate import Estimator, robust_scale
from fedmezo.zo.noise import Law
from fedmezo.zo.seedsum import Update

__all__ = ["Settings", "State", "advanced", "ask", "fedmezo"]

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
      decay: how the rate falls over `rounds`: constant | linear | cosine | wsd.
      rounds: number of rounds T, used by the decay only.
      law: law of the directions.
      estimator: two-point | forward | forward-half.
      dense: clients send the walk written out instead of its scalars.
      coding: number format of the slopes on the wire.
      normalise: divide the slopes of a step by their root mean square; needs `directions` >= 2.
      momentum: share of the last step that is repeated, in [0, 1).
      shared: all clients of a round walk along the same directions.
      quantile: the slopes' scale is this quantile of a round's |slope|, as a deviation; see `robust_scale`.
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
    coding: Coding = "float32"
    normalise: bool = False
    momentum: float = 0.0
    shared: bool = False
    quantile: float = 0.5


@dataclass(frozen=True)
class State:
    """What the server remembers between rounds, apart from the model.

    Attributes:
      round: rounds done.
      scale: running scale of the slopes, which sets the clip in force; 0 before the first round.
      lowest: lowest running scale so far; 0 before the first round.
      slowed: factor on every rate, lowered by guards.
      factors: client -> factor on its rate; 1 for all others.
    """

    round: int = 0
    scale: float = 0.0
    lowest: float = 0.0
    slowed: float = 1.0
    factors: Mapping[int, float] = field(default_factory=dict)


S = TypeVar("S", bound=State)


def ask(settings: Settings, state: State, *, seed: int, client: int) -> Task:
    """Returns the task of one client in this round."""
    everyones = settings.rate * state.slowed * decayed(settings.decay, state.round, settings.rounds)
    return Task(
        state.round,
        client,
        seed,
        everyones * state.factors.get(client, 1.0),
        settings.mu,
        settings.steps,
        settings.directions,
        clip=_clip(settings, state),
        multiple=settings.clip if math.isfinite(settings.clip) else 1.0,
        law=settings.law,
        estimator=settings.estimator,
        dense=settings.dense,
        coding=settings.coding,
        normalise=settings.normalise,
        momentum=settings.momentum,
        shared=settings.shared,
    )


def advanced(state: S, replies: Sequence[Reply], *, quantile: float = 0.5) -> S:
    """Returns the state after a round with these replies; their slopes set the next clip."""
    seen = robust_scale([slope for reply in own(replies) for slope in reply.slopes], quantile=quantile)
    scale = _follow(state, seen)
    return replace(state, round=state.round + 1, scale=scale, lowest=min(state.lowest or scale, scale))


def fedmezo(
    settings: Settings,
    *,
    seed: int,
    cohort: int,
    weights: Weighting = uniform_weights,
) -> Algorithm[State]:
    """Returns FedMeZO as an algorithm.

    Args:
      settings: the numbers of the run.
      seed: the run's seed; names every direction and every cohort.
      cohort: clients per round, drawn without replacement.
      weights: tasks with their replies -> weight of each.
    """

    def plan(state: State, clients: Sequence[int]) -> list[Task]:
        drawn = draw_cohort(seed, state.round, clients, cohort)
        return [ask(settings, state, seed=seed, client=client) for client in drawn]

    def aggregate(state: State, tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[State, Update]:
        pairs = answers(tasks, replies, round=state.round)
        walks = tuple(reply.delta or walk_of(task, reply.slopes) for task, reply in pairs)
        update = Update(walks, weights_of(pairs, weights), state.round)
        return advanced(state, [reply for _, reply in pairs], quantile=settings.quantile), update

    def slow_down(state: State, factor: float) -> State:
        return replace(state, slowed=state.slowed * factor)

    def with_factors(state: State, factors: Mapping[int, float]) -> State:
        return replace(state, factors=factors)

    return Algorithm(State, plan, take_walks, aggregate, slow_down, with_factors)


def _clip(settings: Settings, state: State) -> float:
    """Returns the limit on |slope| in force; 0 when no scale is known yet."""
    return math.inf if math.isinf(settings.clip) else settings.clip * state.scale


def _follow(state: State, seen: float) -> float:
    """Returns the running scale after a round whose slopes had the robust scale `seen` (0: none was finite)."""
    if state.scale == 0 or seen == 0:
        return state.scale or seen
    return min(max(seen, _FALL * state.scale), _RISE * state.scale, _MOST * state.lowest)
