"""What the units of a run have spent of their privacy: counted from its replies, told each round, and held to a budget.

with_spending(with_example_privacy(algorithm, ...), Spending(cost, rates, releases=30, budget=4.0))
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from fedmezo.errors import RunError
from fedmezo.fl.algorithm import Algorithm, Reply, Task
from fedmezo.fl.whole import WHOLE, own
from fedmezo.zo.seedsum import Update

__all__ = ["SPENT", "Spending", "SpentState", "foremost", "with_spending"]

SPENT = "privacy"  # the kind of event that says how much has been spent, as JSON

S = TypeVar("S")


@dataclass(frozen=True)
class Spending:
    """What a round costs.

    Attributes:
      cost: (sampling rate, number of releases) -> epsilon; grows with both.
      rates: client -> the rate at which its units are sampled; {WHOLE: rate} where all clients are one release.
      releases: releases of a client in a round it takes part in.
      budget: the most that anyone may spend; inf for no limit.
      told: what else the events say, such as delta.
    """

    cost: Callable[[float, int], float]
    rates: Mapping[int, float]
    releases: int = 1
    budget: float = math.inf
    told: Mapping[str, object] = field(default_factory=dict)

    def spent(self, rounds: Mapping[int, int]) -> float:
        """Returns the largest epsilon of any client.

        Args:
          rounds: client -> rounds it took part in.
        """
        pairs = foremost([(self.rates[client], self.releases * count) for client, count in rounds.items()])
        return max((self.cost(*pair) for pair in pairs), default=0.0)

    def able(self, clients: Sequence[int], rounds: Mapping[int, int]) -> list[int]:
        """Returns those of the clients that may take part in one round more."""
        after = {client: rounds.get(client, 0) + 1 for client in clients}
        # What the dearest can pay all can; usually one sum is enough.
        dearest = max(self.rates[client] for client in clients), self.releases * max(after.values())
        if math.isinf(self.budget) or self.cost(*dearest) <= self.budget:
            return list(clients)
        return [client for client, count in after.items() if self.spent({client: count}) <= self.budget]


def foremost(pairs: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """Returns the pairs that no other one is at least as large as in both places."""
    found: list[tuple[float, int]] = []
    for rate, count in sorted(set(pairs), reverse=True):
        if not found or count > found[-1][1]:
            found.append((rate, count))
    return found


@dataclass(frozen=True)
class SpentState(Generic[S]):
    """The state of an algorithm, and who has spent how much.

    Attributes:
      inner: the algorithm's own.
      rounds: client -> rounds it took part in; that of `WHOLE` where all clients are one release.
    """

    inner: S
    rounds: Mapping[int, int] = field(default_factory=dict)


def with_spending(algorithm: Algorithm[S], spending: Spending) -> Algorithm[SpentState[S]]:
    """Returns the algorithm that asks nobody beyond the budget, and says after each round what has been spent.

    Laws: with a budget of inf this is the algorithm itself; a run that is gone on with has spent what it had.

    Raises:
      RunError: in `plan`, when nobody has anything left.
    """
    together = WHOLE in spending.rates

    def plan(state: SpentState[S], clients: Sequence[int]) -> Sequence[Task]:
        asked = [WHOLE] if together else list(clients)
        able = spending.able(asked, state.rounds)
        if not able:
            raise RunError(
                f"The privacy budget is spent: one round more would cost epsilon "
                f"{spending.spent({c: state.rounds.get(c, 0) + 1 for c in asked}):.4g}, and privacy.epsilon is "
                f"{spending.budget:g}; every finished round is in the journal."
            )
        return algorithm.plan(state.inner, clients if together else able)

    def aggregate(
        state: SpentState[S], tasks: Sequence[Task], replies: Sequence[Reply]
    ) -> tuple[SpentState[S], Update]:
        inner, update = algorithm.aggregate(state.inner, tasks, replies)
        there = [WHOLE] if together else [reply.client for reply in own(replies)]
        more = {client: state.rounds.get(client, 0) + 1 for client in there}
        return SpentState(inner, {**state.rounds, **more}), update

    def remarks(state: SpentState[S]) -> list[tuple[str, str]]:
        spent = spending.spent(state.rounds)
        told = {"epsilon": spent if math.isfinite(spent) else None, **spending.told}
        return [*algorithm.remarks(state.inner), (SPENT, json.dumps(told))]

    return Algorithm(
        init=lambda: SpentState(algorithm.init()),
        plan=plan,
        client=algorithm.client,
        aggregate=aggregate,
        slow_down=lambda state, by: replace(state, inner=algorithm.slow_down(state.inner, by)),
        with_factors=lambda state, factors: replace(state, inner=algorithm.with_factors(state.inner, factors)),
        sums=lambda state: algorithm.sums(state.inner),
        gather=algorithm.gather,
        remarks=remarks,
    )
