"""FedAvg with backpropagation (McMahan et al., arXiv:1602.05629): the baseline, and the one algorithm with a graph."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor

from fedmezo.errors import ConfigError, RunError
from fedmezo.fl.aggregate import Weighting, uniform_weights, weights_of
from fedmezo.fl.algorithm import Algorithm, Bench, Point, Reply, Task
from fedmezo.fl.cohort import Decay, answers, decayed, draw_cohort
from fedmezo.zo.params import Params
from fedmezo.zo.seedsum import DenseDelta, Update

__all__ = ["Settings", "State", "descend", "fedavg"]

Optimizer = Literal["sgd", "adamw"]
_UNUSED_MU = 1e-3  # a task has a mu; nothing is perturbed here


@dataclass(frozen=True)
class Settings:
    """The numbers of a run.

    Attributes:
      rate: learning rate of the first round.
      steps: local steps H.
      optimizer: sgd (the papers' baseline) | adamw; its state starts anew every round.
      momentum: of sgd, in [0, 1); adamw keeps means of its own.
      weight_decay: share of the parameters taken off per unit of rate.
      decay: how the rate falls over `rounds`: constant | linear | cosine.
      rounds: number of rounds T, used by the decay only.

    Raises:
      ConfigError: momentum with adamw.
    """

    rate: float
    steps: int
    optimizer: Optimizer = "sgd"
    momentum: float = 0.0
    weight_decay: float = 0.0
    decay: Decay = "constant"
    rounds: int = 1

    def __post_init__(self) -> None:
        """Refuses what an optimiser would ignore."""
        if self.momentum and self.optimizer == "adamw":
            raise ConfigError(
                f"algorithm.momentum is for sgd, got {self.momentum} with adamw, which keeps means of its own; set it "
                "to 0."
            )


@dataclass(frozen=True)
class State:
    """What the server remembers between rounds, apart from the model.

    Attributes:
      round: rounds done.
      slowed: factor on every rate, lowered by guards.
      factors: client -> factor on its rate; 1 for all others.
    """

    round: int = 0
    slowed: float = 1.0
    factors: Mapping[int, float] = field(default_factory=dict)


def fedavg(
    settings: Settings,
    *,
    seed: int,
    cohort: int,
    weights: Weighting = uniform_weights,
) -> Algorithm[State]:
    """Returns FedAvg as an algorithm; arguments as for `fedmezo`, which draws the same cohorts and batches."""

    def task(state: State, client: int) -> Task:
        rate = settings.rate * state.slowed * decayed(settings.decay, state.round, settings.rounds)
        return Task(
            state.round,
            client,
            seed,
            rate * state.factors.get(client, 1.0),
            _UNUSED_MU,
            settings.steps,
            momentum=settings.momentum,
            method=settings.optimizer,
            weight_decay=settings.weight_decay,
        )

    def plan(state: State, clients: Sequence[int]) -> list[Task]:
        return [task(state, client) for client in draw_cohort(seed, state.round, clients, cohort)]

    def aggregate(state: State, tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[State, Update]:
        pairs = answers(tasks, replies, round=state.round)
        update = Update(tuple(_delta(reply) for _, reply in pairs), weights_of(pairs, weights), state.round)
        return replace(state, round=state.round + 1), update

    def slow_down(state: State, factor: float) -> State:
        return replace(state, slowed=state.slowed * factor)

    def with_factors(state: State, factors: Mapping[int, float]) -> State:
        return replace(state, factors=factors)

    return Algorithm(State, plan, descend, aggregate, slow_down, with_factors)


def _delta(reply: Reply) -> DenseDelta:
    if reply.delta is None:
        raise RunError(f"Round {reply.round}: client {reply.client} sent no change of the parameters.")
    return reply.delta


def descend(tasks: Sequence[Task], bench: Bench) -> list[Reply]:
    """Returns one reply per task: H steps of torch's own SGD or AdamW along backpropagated gradients.

    One client at a time. A step whose loss or gradient is not finite is skipped. The bench's parameters keep their
    bits. Memory, with d trained scalars of 4 bytes: beyond the model, each of these holds d: the gradient, momentum if
    any, AdamW's two means, and the private copy ("full": the copy is the model itself, and its end is written out only
    when gradient and optimiser are gone). Activations come on top: all of a pass, or layer inputs with checkpointing.

    Raises:
      RunError: a task asks for another method than sgd or adamw.
    """
    return [_descend(task, bench) for task in tasks]


def _descend(task: Task, bench: Bench) -> Reply:
    with bench.open(1) as (copy,):
        losses, examples = _steps_(copy, task, bench)
        end = copy.clone()  # the copy of "full" is about to become the global model again
    delta = {name: end[name].sub_(start) for name, start in bench.params}
    return Reply(task.round, task.client, examples, fmean(losses) if losses else math.nan, (), DenseDelta(delta))


def _steps_(params: Params, task: Task, bench: Bench) -> tuple[list[float], int]:
    """Takes the local steps; returns the losses of those taken and how many examples they saw."""
    # The optimiser writes through tensors of its own, so that no `.grad` is left on the parameters.
    held = {name: tensor.detach() for name, tensor in params}
    optimizer = _optimizer(list(held.values()), task)
    losses, examples = [], 0
    for step in range(task.steps):
        loss = _step_(held, optimizer, Point(params, 0, 0.0, task.client, task.round, step), bench)
        if loss is not None:
            losses.append(loss)
            examples += bench.examples(task.client, task.round, step)
    return losses, examples


def _step_(held: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, point: Point, bench: Bench) -> float | None:
    """Takes one step and returns the loss before it; None, and no step, when loss or gradient is not finite."""
    loss, gradient = bench.gradient(point)
    if not _finite(loss, gradient):
        return None
    for name, tensor in held.items():
        tensor.grad = gradient[name]
    optimizer.step()
    # Before the next backward pass makes a gradient, this one is gone.
    optimizer.zero_grad(set_to_none=True)
    return loss


def _optimizer(tensors: list[Tensor], task: Task) -> torch.optim.Optimizer:
    if task.method == "sgd":
        return torch.optim.SGD(tensors, lr=task.rate, momentum=task.momentum, weight_decay=task.weight_decay)
    if task.method == "adamw":
        return torch.optim.AdamW(tensors, lr=task.rate, weight_decay=task.weight_decay)
    raise RunError(f"Backpropagation descends by sgd or adamw, got a task for '{task.method}'; please report this bug.")


def _finite(loss: float, gradient: Mapping[str, Tensor]) -> bool:
    return math.isfinite(loss) and all(bool(torch.isfinite(part).all()) for part in gradient.values())
