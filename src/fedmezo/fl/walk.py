"""The client's side of every zeroth-order algorithm: walk H steps along named directions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from fedmezo.fl.algorithm import Bench, Point, Reply, Task
from fedmezo.fl.pool import Directions, directions_of
from fedmezo.zo.coding import coded
from fedmezo.zo.estimate import forward_difference, momentum_powers, momentum_sums, step_coefficients, two_point
from fedmezo.zo.noise import round_coefficient
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_, walk_delta
from fedmezo.zo.seedsum import Walk

__all__ = ["Walker", "take_walks", "walk_of", "walks_by"]


def walk_of(task: Task, slopes: Sequence[float]) -> Walk:
    """Returns the walk that `slopes` stand for: what the client did, rebuilt by anyone who has the task."""
    named = _named(task, len(slopes))
    ends = range(task.directions, len(slopes) + 1, task.directions)
    pushes = [push for end in ends for push in _pushes(task, named, slopes, end)]
    total = momentum_sums(pushes, directions=task.directions, momentum=task.momentum)
    return Walk(named.seeds[: len(total)], tuple(round_coefficient(c) for c in total))


def _named(task: Task, count: int) -> Directions:
    """Returns the directions of the steps that `count` slopes fill; a task may have named millions more."""
    steps = min(count // task.directions, task.steps)
    if not steps:
        return Directions(())
    return directions_of(replace(task, steps=steps) if steps < task.steps else task)


def _pushes(task: Task, named: Directions, slopes: Sequence[float], end: int) -> list[float]:
    """Returns the coefficients of the step whose last slope is number `end`, without momentum."""
    begin = end - task.directions
    return step_coefficients(
        # What came before a step counts for a running limit only, and a walk may be a million steps long.
        slopes[begin if task.clip > 0 else 0 : end],
        rate=task.rate,
        directions=task.directions,
        clip=task.clip,
        multiple=task.multiple,
        normalise=task.normalise,
        factors=named.factors[begin:end],
    )


@dataclass
class Walker:
    """One client on its way: its private copy of the parameters and what it has seen."""

    task: Task
    params: Params
    named: Directions
    slopes: list[float] = field(default_factory=list)
    pushes: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    examples: int = 0

    def points(self, step: int) -> list[Point]:
        """Returns where to look for this step: both sides of each direction, or one side of each and the middle."""
        task, first = self.task, step * self.task.directions
        seeds = self.named.seeds[first : first + task.directions]
        if task.estimator == "two-point":
            looks = [(seed, offset) for seed in seeds for offset in (task.mu, -task.mu)]
        else:
            looks = [*((seed, task.mu) for seed in seeds), (seeds[0], 0.0)]
        return [Point(self.params, seed, offset, task.client, task.round, step) for seed, offset in looks]

    def move_(self, losses: Sequence[float], examples: int) -> None:
        """Takes one step from the losses at `points`; a direction with a loss that is not finite is skipped."""
        task = self.task
        both = task.estimator == "two-point"
        above, other = (losses[::2], losses[1::2]) if both else (losses[:-1], [losses[-1]] * task.directions)
        slopes = [coded(self.slope(*pair), task.coding) for pair in zip(above, other, strict=True)]
        self.losses += [(a + b) / 2 for a, b, s in zip(above, other, slopes, strict=True) if math.isfinite(s)]
        self.examples += examples if any(map(math.isfinite, slopes)) else 0
        self.follow_(slopes)

    def follow_(self, slopes: Sequence[float]) -> None:
        """Takes one step by its slopes, nan where skipped, as they will travel."""
        task = self.task
        self.slopes += slopes
        self.pushes += _pushes(task, self.named, self.slopes, len(self.slopes))
        # The velocity is never formed: directions still in reach are named again, with what is left of their push.
        powers = momentum_powers(task.momentum, most=len(self.pushes) // task.directions)
        latest = len(self.pushes) - task.directions
        for at in range(max(0, latest - task.directions * (len(powers) - 1)), len(self.pushes)):
            amount = self.pushes[at] * powers[(latest - at + task.directions - 1) // task.directions]
            if amount:
                step_(self.params, self.named.seeds[at], coefficient=amount, law=task.law)

    def slope(self, above: float, other: float) -> float:
        """Returns the slope of two losses by the task's estimator, before coding; nan if one is not finite."""
        if self.task.estimator == "two-point":
            return two_point(above, other, mu=self.task.mu)
        printed = self.task.estimator == "forward-half"
        return forward_difference(above, other, mu=self.task.mu, paper_eq2_scale=printed)

    def reply(self) -> Reply:
        """Returns what travels back."""
        task = self.task
        loss = fmean(self.losses) if self.losses else math.nan
        delta = walk_delta(self.params, walk_of(task, self.slopes), law=task.law) if task.dense else None
        return Reply(task.round, task.client, self.examples, loss, tuple(self.slopes), delta, task.coding)


Advance = Callable[[Sequence[Walker], int, Bench], None]


def take_walks(tasks: Sequence[Task], bench: Bench) -> list[Reply]:
    """Returns one reply per task: H steps of two-point descent each, many clients per forward pass.

    Memory is bounded by the bench's capacity whatever the number of clients. The bench's parameters keep their bits.

    Source: Eq. 4 of arXiv:2402.05926.
    """
    return walks_by(tasks, bench, advance=_advance)


def walks_by(tasks: Sequence[Task], bench: Bench, *, advance: Advance) -> list[Reply]:
    """Returns one reply per task of walks whose every step is taken by `advance`: (who goes, step, bench)."""
    replies: list[Reply] = []
    for begin in range(0, len(tasks), bench.capacity):
        group = tasks[begin : begin + bench.capacity]
        with bench.open(len(group)) as copies:
            walkers = [Walker(task, params, directions_of(task)) for task, params in zip(group, copies, strict=True)]
            for step in range(max(task.steps for task in group)):
                advance([walker for walker in walkers if step < walker.task.steps], step, bench)
            replies += [walker.reply() for walker in walkers]
    return replies


def _advance(going: Sequence[Walker], step: int, bench: Bench) -> None:
    wanted = [walker.points(step) for walker in going]
    losses = iter(bench.losses([point for points in wanted for point in points]))
    for walker, points in zip(going, wanted, strict=True):
        seen = [next(losses) for _ in points]
        walker.move_(seen, bench.examples(walker.task.client, walker.task.round, step))
