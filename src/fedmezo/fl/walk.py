"""The client's side of every zeroth-order algorithm: walk H steps along named directions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from fedmezo.fl.algorithm import Bench, Point, Reply, Task
from fedmezo.zo.estimate import (
    clip_slope,
    coefficient,
    forward_difference,
    slope_limit,
    step_coefficients,
    two_point,
)
from fedmezo.zo.noise import derive_seed, round_coefficient
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_, walk_delta
from fedmezo.zo.seedsum import Walk

__all__ = ["direction_seed", "take_walks", "walk_of"]


def direction_seed(task: Task, step: int, direction: int) -> int:
    """Returns the name of a direction, from (run, round, client, step, direction): it need not travel."""
    return derive_seed("direction", task.seed, task.round, task.client, step, direction)


def walk_of(task: Task, slopes: Sequence[float]) -> Walk:
    """Returns the walk that `slopes` stand for: what the client did, rebuilt by anyone who has the task."""
    pairs = [(step, direction) for step in range(task.steps) for direction in range(task.directions)]
    coefficients = step_coefficients(
        slopes, rate=task.rate, directions=task.directions, clip=task.clip, multiple=task.multiple
    )
    seeds = tuple(direction_seed(task, step, direction) for step, direction in pairs[: len(slopes)])
    return Walk(seeds, tuple(round_coefficient(c) for c in coefficients))


@dataclass
class _Walker:
    """One client on its way: its private copy of the parameters and what it has seen."""

    task: Task
    params: Params
    slopes: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    examples: int = 0

    def points(self, step: int) -> list[Point]:
        """Returns where to look for this step: two points per direction."""
        task = self.task
        far = -task.mu if task.estimator == "two-point" else 0.0
        return [
            Point(self.params, direction_seed(task, step, n), offset, task.client, task.round, step)
            for n in range(task.directions)
            for offset in (task.mu, far)
        ]

    def move_(self, step: int, losses: Sequence[float], examples: int) -> None:
        """Takes one step from the losses at `points(step)`; a direction with a loss that is not finite is skipped."""
        task, before = self.task, len(self.slopes)
        for above, other in zip(losses[::2], losses[1::2], strict=True):
            slope = self._slope(above, other)
            self.slopes.append(slope)
            if math.isfinite(slope):
                self.losses.append((above + other) / 2)
        self.examples += examples if any(map(math.isfinite, self.slopes[before:])) else 0
        for n in range(task.directions):
            seen = self.slopes[: before + n + 1]
            limit = slope_limit(seen, clip=task.clip, multiple=task.multiple)
            amount = coefficient(clip_slope(seen[-1], limit=limit), rate=task.rate, directions=task.directions)
            if amount:
                step_(self.params, direction_seed(task, step, n), coefficient=amount, law=task.law)

    def _slope(self, above: float, other: float) -> float:
        if self.task.estimator == "two-point":
            return two_point(above, other, mu=self.task.mu)
        printed = self.task.estimator == "forward-half"
        return forward_difference(above, other, mu=self.task.mu, paper_eq2_scale=printed)

    def reply(self) -> Reply:
        """Returns what travels back."""
        task = self.task
        loss = fmean(self.losses) if self.losses else math.nan
        delta = walk_delta(self.params, walk_of(task, self.slopes), law=task.law) if task.dense else None
        return Reply(task.round, task.client, self.examples, loss, tuple(self.slopes), delta)


def take_walks(tasks: Sequence[Task], bench: Bench) -> list[Reply]:
    """Returns one reply per task: H steps of two-point descent each, many clients per forward pass.

    Memory is bounded by the bench's capacity whatever the number of clients. The bench's parameters keep their bits.

    Source: Eq. 4 of arXiv:2402.05926.
    """
    replies: list[Reply] = []
    for begin in range(0, len(tasks), bench.capacity):
        group = tasks[begin : begin + bench.capacity]
        with bench.open(len(group)) as copies:
            walkers = [_Walker(task, params) for task, params in zip(group, copies, strict=True)]
            for step in range(max(task.steps for task in group)):
                _advance(walkers, step, bench)
            replies += [walker.reply() for walker in walkers]
    return replies


def _advance(walkers: Sequence[_Walker], step: int, bench: Bench) -> None:
    going = [walker for walker in walkers if step < walker.task.steps]
    wanted = [walker.points(step) for walker in going]
    losses = iter(bench.losses([point for points in wanted for point in points]))
    for walker, points in zip(going, wanted, strict=True):
        seen = [next(losses) for _ in points]
        walker.move_(step, seen, bench.examples(walker.task.client, walker.task.round, step))
