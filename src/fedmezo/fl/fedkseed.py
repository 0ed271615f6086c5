"""FedKSeed and FedKSeed-Pro (Qin et al., arXiv:2312.06353): FedMeZO's walk along directions from a pool of K seeds.

The model is base + sum_j sums[j] * z(s_j) after any number of rounds, so K numbers say all of it. The paper keeps sums
of slopes and multiplies by a constant rate; here the sums are of coefficients, so rates may decay or differ by client.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedmezo.fl.aggregate import Weighting, uniform_weights, weights_of
from fedmezo.fl.algorithm import MAX_ODDS, Algorithm, Reply, Task
from fedmezo.fl.cohort import answers, draw_cohort
from fedmezo.fl.fedmezo import Settings, State, advanced, ask
from fedmezo.fl.pool import directions_of
from fedmezo.fl.walk import take_walks, walk_of
from fedmezo.fl.whole import is_whole
from fedmezo.zo.seedsum import Update

__all__ = ["Pool", "PoolState", "fedkseed", "odds_of"]

Sums = NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """The candidate seeds, and how likely each is drawn.

    Attributes:
      size: number of candidates K.
      pro: draw by what the seeds have done so far (FedKSeed-Pro) instead of uniformly.
      temperature: what the scores are divided by before the softmax.
      importance: weight every step by 1 / (K p), so that its mean is that of a uniform draw.
      score_clip: |slope| counts at most this much in a score; the paper's C.
      score_prior: every seed's history begins with a slope of 0, as in the released code.
    """

    size: int
    pro: bool = False
    temperature: float = 1.0
    importance: bool = False
    score_clip: float = 1000.0
    score_prior: bool = True


@dataclass(frozen=True, kw_only=True)
class PoolState(State):
    """What the server remembers; its size depends on K alone, not on rounds, steps or clients.

    Attributes:
      sums: the model minus its base, as coefficients of the K candidates, float64.
      scores: sum of clipped |slope| over each candidate's history, float64.
      counts: length of each history.
    """

    sums: Sums
    scores: Sums
    counts: NDArray[np.int64]


def odds_of(state: PoolState, pool: Pool) -> tuple[int, ...]:
    """Returns the odds of each candidate as whole numbers up to 65535, for everyone to draw by; () if all are alike.

    Mean clipped |slope|, scaled to [0, 1] over the pool, softmax of it / temperature. Without a prior, candidates never
    drawn count as average ones. At temperature 1 no candidate is more than e times likelier than another.

    Source: PAPER section 6.3 (FedKSeed-Pro).
    """
    seen = state.counts > 0
    if not pool.pro or not seen.any():
        return ()
    means = np.divide(state.scores, state.counts, out=np.zeros(pool.size), where=seen)
    means[~seen] = means[seen].mean()
    spread = float(np.ptp(means))
    if spread == 0:
        return ()
    scaled = (means - means.min()) / spread
    return tuple(np.maximum(1, np.rint(MAX_ODDS * np.exp((scaled - 1) / pool.temperature))).astype(int).tolist())


def fedkseed(
    settings: Settings,
    pool: Pool,
    *,
    seed: int,
    cohort: int,
    weights: Weighting = uniform_weights,
) -> Algorithm[PoolState]:
    """Returns FedKSeed, or FedKSeed-Pro when `pool.pro`, as an algorithm; arguments as for `fedmezo`."""

    def init() -> PoolState:
        prior = int(pool.pro and pool.score_prior)
        return PoolState(
            sums=np.zeros(pool.size), scores=np.zeros(pool.size), counts=np.full(pool.size, prior, np.int64)
        )

    def plan(state: PoolState, clients: Sequence[int]) -> list[Task]:
        odds, drawn = odds_of(state, pool), draw_cohort(seed, state.round, clients, cohort)
        plain = (ask(settings, state, seed=seed, client=client) for client in drawn)
        return [replace(task, pool=pool.size, odds=odds, importance=pool.importance) for task in plain]

    def aggregate(state: PoolState, tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[PoolState, Update]:
        pairs = answers(tasks, replies, round=state.round)
        walks = tuple(walk_of(task, reply.slopes) for task, reply in pairs)
        update = Update(walks, weights_of(pairs, weights), state.round)
        sums, scores, counts = state.sums.copy(), state.scores.copy(), state.counts.copy()
        for (task, reply), walk, weight in zip(pairs, walks, update.weights, strict=True):
            places = np.array(directions_of(task).places)[: len(reply.slopes)]
            np.add.at(sums, places, weight * np.array(walk.coefficients))
            if not is_whole(reply):  # whose slopes are no slopes of the loss
                finite = np.isfinite(reply.slopes)
                np.add.at(scores, places[finite], np.minimum(np.abs(reply.slopes)[finite], pool.score_clip))
                np.add.at(counts, places[finite], 1)
        ours = advanced(state, [reply for _, reply in pairs], quantile=settings.quantile)
        return replace(ours, sums=sums, scores=scores, counts=counts), update

    def slow_down(state: PoolState, factor: float) -> PoolState:
        return replace(state, slowed=state.slowed * factor)

    def with_factors(state: PoolState, factors: Mapping[int, float]) -> PoolState:
        return replace(state, factors=factors)

    return Algorithm(init, plan, take_walks, aggregate, slow_down, with_factors, lambda state: state.sums)
