"""What a federated algorithm is, and the messages it speaks."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, Literal, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedmezo.errors import RunError
from fedmezo.zo.coding import CODINGS, Coding
from fedmezo.zo.estimate import Estimator
from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params
from fedmezo.zo.seedsum import DenseDelta, Update

__all__ = ["Algorithm", "Bench", "Gather", "Method", "Point", "Reply", "Task"]

Method = Literal["walk", "sgd", "adamw"]
METHODS: tuple[Method, ...] = ("walk", "sgd", "adamw")
MAX_SLOPES = 1 << 24
MAX_ODDS = (1 << 16) - 1  # the largest of `Task.odds`


def _require(good: bool, sentence: str, *values: object) -> None:  # noqa: FBT001
    if not good:
        raise RunError(sentence.format(*values))  # which takes longer than all the checks of a task


@lru_cache(maxsize=4)
def _ends(odds: tuple[int, ...]) -> tuple[int, int]:
    # All tasks of a round have the same odds; a thousand of them shall not search these a thousand times.
    return min(odds), max(odds)


@dataclass(frozen=True, slots=True)
class Task:
    """What the server asks of one client in one round.

    Attributes:
      round: round number t, from 0.
      client: stable client number.
      seed: the run's seed; with (round, client, step, direction) it names every direction, so none travels.
      rate: learning rate eta_i.
      mu: perturbation scale.
      steps: local steps H.
      directions: directions averaged per step, n.
      clip: limit on |slope|; inf for none; 0 for "unknown yet: use the walk's own running scale".
      multiple: how many robust scales the walk's own running limit is, when `clip` is 0.
      law: law of z.
      estimator: "two-point", "forward" (factor 1/mu) or "forward-half" (Eq. 2 as printed).
      dense: whether the reply carries the walk written out.
      pool: number K of candidate seeds directions are drawn from; 0: every direction is fresh.
      odds: candidate j is drawn with probability odds[j] / sum(odds), each in [1, 65535]; () for all alike.
      importance: whether a step is multiplied by 1 / (K p_j), so that its mean is that of a uniform draw.
      coding: number format slopes travel in; the client walks by the rounded ones.
      normalise: whether the slopes of a step are divided by their deviation.
      momentum: share of the step before that is repeated, in [0, 1); starts anew with every task.
      method: "walk" takes forward passes only; "sgd" and "adamw" descend by backpropagation.
      weight_decay: share of the parameters taken off per unit of rate; backpropagation only.
      shared: all clients of a round have the same directions, so that their slopes can be compared one by one; the
        client's number names none of them.

    Raises:
      RunError: a field is out of range.
    """

    round: int
    client: int
    seed: int
    rate: float
    mu: float
    steps: int
    directions: int = 1
    clip: float = math.inf
    multiple: float = 3.0
    law: Law = "gaussian"
    estimator: Estimator = "two-point"
    dense: bool = False
    pool: int = 0
    odds: tuple[int, ...] = ()
    importance: bool = False
    coding: Coding = "float32"
    normalise: bool = False
    momentum: float = 0.0
    method: Method = "walk"
    weight_decay: float = 0.0
    shared: bool = False

    def __post_init__(self) -> None:
        """Checks every field."""
        _require(0 <= self.round < 2**32, "Task.round must be in [0, 2**32), got {}.", self.round)
        _require(0 <= self.client < 2**32, "Task.client must be in [0, 2**32), got {}.", self.client)
        _require(0 <= self.seed < 2**64, "Task.seed must be in [0, 2**64), got {}.", self.seed)
        _require(math.isfinite(self.rate) and self.rate >= 0, "Task.rate must be finite and >= 0, got {}.", self.rate)
        _require(math.isfinite(self.mu) and self.mu > 0, "Task.mu must be finite and > 0, got {}.", self.mu)
        _require(self.steps >= 1 and self.directions >= 1, "Task.steps and Task.directions must be at least 1.")
        _require(self.steps * self.directions <= MAX_SLOPES, "Task: steps * directions must be at most 2**24.")
        _require(self.clip >= 0, "Task.clip must be >= 0 or inf, got {}.", self.clip)
        _require(
            math.isfinite(self.multiple) and self.multiple > 0, "Task.multiple must be > 0, got {}.", self.multiple
        )
        _require(self.law in ("gaussian", "rademacher"), "Task.law must be gaussian or rademacher, got {!r}.", self.law)
        known = ("two-point", "forward", "forward-half")
        _require(self.estimator in known, "Task.estimator must be one of {}, got {!r}.", known, self.estimator)
        self._check_options()

    def _check_options(self) -> None:
        _require(0 <= self.pool < 2**32, "Task.pool must be in [0, 2**32), got {}.", self.pool)
        if self.odds:
            _require(len(self.odds) == self.pool, "Task.odds must hold {} numbers, got {}.", self.pool, len(self.odds))
            least, most = _ends(self.odds)
            _require(
                least >= 1 and most <= MAX_ODDS, "Task.odds must be in [1, {}], got {} to {}.", MAX_ODDS, least, most
            )
        _require(self.coding in CODINGS, "Task.coding must be one of {}, got {!r}.", CODINGS, self.coding)
        _require(not self.normalise or self.directions > 1, "Task.normalise needs at least 2 directions per step.")
        _require(0 <= self.momentum < 1, "Task.momentum must be in [0, 1), got {}.", self.momentum)
        _require(self.method in METHODS, "Task.method must be one of {}, got {!r}.", METHODS, self.method)
        decay = self.weight_decay
        _require(math.isfinite(decay) and decay >= 0, "Task.weight_decay must be finite and >= 0, got {}.", decay)
        _require(not decay or self.method != "walk", "Task.weight_decay is for backpropagation only.")

    @property
    def slopes(self) -> int:
        """How many slopes its reply has: one per direction of every step; none after backpropagation."""
        return self.steps * self.directions if self.method == "walk" else 0


@dataclass(frozen=True, slots=True)
class Reply:
    """What one client answers.

    Attributes:
      round: the task's round.
      client: the task's client.
      examples: training examples the walk used.
      loss: mean over finite steps of the loss around the walk's points, nats; nan when every step was skipped.
      slopes: steps * directions slopes before clipping, rounded to `coding`; nan where a loss was not finite (step
        skipped). Empty after backpropagation.
      delta: the walk written out, for dense transport and backpropagation only.
      coding: number format the slopes travel in.
    """

    round: int
    client: int
    examples: int
    loss: float
    slopes: tuple[float, ...]
    delta: DenseDelta | None = None
    coding: Coding = "float32"

    def __post_init__(self) -> None:
        """Checks every field."""
        _require(0 <= self.round < 2**32, "Reply.round must be in [0, 2**32), got {}.", self.round)
        _require(0 <= self.client < 2**32, "Reply.client must be in [0, 2**32), got {}.", self.client)
        _require(0 <= self.examples < 2**32, "Reply.examples must be in [0, 2**32), got {}.", self.examples)
        _require(not any(map(math.isinf, self.slopes)), "Reply.slopes must be finite, or nan for a skipped step.")
        _require(
            len(self.slopes) <= MAX_SLOPES, "Reply.slopes must hold at most 2**24 values, got {}.", len(self.slopes)
        )
        _require(self.coding in CODINGS, "Reply.coding must be one of {}, got {!r}.", CODINGS, self.coding)

    @property
    def skipped(self) -> int:
        """How many slopes were skipped because a loss was not finite."""
        return sum(map(math.isnan, self.slopes))


@dataclass(frozen=True, slots=True)
class Point:
    """Where to evaluate a loss: params + offset * z(seed), on the batch of (client, round, step).

    With `draw` the batch is a Poisson sample instead, which this secret name draws from all the client's examples.
    """

    params: Params
    seed: int
    offset: float
    client: int
    round: int
    step: int
    draw: bytes = b""


class Bench(Protocol):
    """A frozen base model, and private copies of the trainable parameters, lent for the length of one call."""

    @property
    def params(self) -> Params:
        """The global model's trainable parameters; a client only reads them."""

    @property
    def capacity(self) -> int:
        """How many private copies may be open at once."""

    def open(self, count: int) -> AbstractContextManager[Sequence[Params]]:
        """Lends `count` private copies that start equal to `params`; afterwards `params` has its old bits."""

    def losses(self, points: Sequence[Point]) -> list[float]:
        """Returns the loss at each point, as many points per forward pass as the lanes allow."""

    def each(self, points: Sequence[Point]) -> list[list[float]]:
        """Returns the loss of each example of each point's batch, in the batch's order; [] where it is empty."""

    def examples(self, client: int, round: int, step: int) -> int:
        """Returns how many examples the batch of (client, round, step) holds."""

    def gradient(self, point: Point) -> tuple[float, Mapping[str, Tensor]]:
        """Returns the loss at a point and its gradient by backpropagation, name -> float32 tensor; offset must be 0."""


Gather = Callable[[Sequence[Task], Sequence[Reply]], tuple[Sequence[Task], Sequence[Reply]]]
S = TypeVar("S")


def _all_of_it(tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[Sequence[Task], Sequence[Reply]]:
    return tasks, replies


@dataclass(frozen=True)
class Algorithm(Generic[S]):
    """A federated algorithm as a value; variants are functions that take one and return one.

    What a round adds follows from the tasks that were sent and the replies to them, not from what would be planned now:
    the numbers of a run may change between rounds, and what was walked before stays what it was.

    Attributes:
      init: the server's state before round 0.
      plan: (state, the clients that are there) -> one task per client of this round's cohort.
      client: (tasks, bench) -> one reply per task; leaves the bench's parameters bit for bit as they were.
      aggregate: (state, tasks, replies) -> (next state, what the round adds to the model). The tasks are those that
        were sent, or that the journal has; some may be without a reply. A reply's task is that of its client, and
        tasks and replies come in any order.
      slow_down: (state, factor) -> the state with every later rate multiplied by `factor`; for guards.
      with_factors: (state, client -> factor) -> the state in which these clients' rates are multiplied by their
        factors, all others' by 1; for personalised rates.
      sums: state -> the model minus its base as coefficients of the K candidate seeds; None when directions are fresh.
      gather: (tasks, replies) -> what the server keeps of a round, before anything else is done with it. It may add a
        walk of nobody that stands for all (`whole.py`), and strike out what shall not be kept. What a journal has went
        through it already.
      remarks: state -> (kind, detail) of the journal's events about the round that made this state.
    """

    init: Callable[[], S]
    plan: Callable[[S, Sequence[int]], Sequence[Task]]
    client: Callable[[Sequence[Task], Bench], Sequence[Reply]]
    aggregate: Callable[[S, Sequence[Task], Sequence[Reply]], tuple[S, Update]]
    slow_down: Callable[[S, float], S]
    with_factors: Callable[[S, Mapping[int, float]], S]
    sums: Callable[[S], NDArray[np.float64] | None] = lambda _: None
    gather: Gather = _all_of_it
    remarks: Callable[[S], Sequence[tuple[str, str]]] = lambda _: ()
