"""Small benches with closed-form losses: federated quadratics and a small MLP, no language model."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fedmezo.errors import DataError
from fedmezo.fl.algorithm import Point
from fedmezo.fl.walk import take_walks
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import lane_

Loss = Callable[[dict[str, Tensor], int, int, int], float]


class ToyBench:
    """Evaluates `loss(tensors, client, round, step)`; copies are whole copies."""

    def __init__(self, params: Params, loss: Loss, *, capacity: int = 2, batch: int = 1, law: str = "gaussian") -> None:
        self.params, self.capacity, self.law = params, capacity, law
        self._loss, self._batch = loss, batch
        self.forwards = self.tokens = 0

    @contextmanager
    def open(self, count: int) -> Iterator[Sequence[Params]]:
        assert count <= self.capacity
        yield [self.params.clone() for _ in range(count)]

    def losses(self, points: Sequence[Point]) -> list[float]:
        self.forwards += len(points)
        return [self._one(point) for point in points]

    def _one(self, point: Point) -> float:
        moved = {name: torch.empty_like(tensor) for name, tensor in point.params}
        for name, tensor in point.params:
            lane_(moved[name], tensor, name=name, seed=point.seed, offset=point.offset, law=self.law)
        return self._loss(moved, point.client, point.round, point.step)

    def each(self, points: Sequence[Point]) -> list[list[float]]:
        return [[loss] for loss in self.losses(points)]

    def examples(self, client: int, round: int, step: int) -> int:
        return self._batch


def quadratic_params() -> Params:
    generator = torch.Generator().manual_seed(3)
    return Params({"b": torch.randn(4, 5, generator=generator), "a": torch.randn(7, generator=generator)})


def quadratic_loss(tensors: dict[str, Tensor], client: int, round: int, step: int) -> float:
    """1/2 |theta - client|^2 in float64: client optima at 0, 1, 2, ..."""
    return 0.5 * sum(float(((t.double() - client) ** 2).sum()) for t in tensors.values())


def quadratic_bench(**options) -> ToyBench:
    return ToyBench(quadratic_params(), quadratic_loss, **options)


def quadratic_recipe(place: int):
    """What a worker process makes its bench with."""
    return take_walks, quadratic_bench()


def broken_recipe(place: int):
    raise DataError("There is no data here; give some.")


def foreign_recipe(place: int):
    return take_walks, ToyBench(Params({"other": torch.zeros(3)}), quadratic_loss)


def leaky_recipe(place: int):
    def client(tasks, bench):
        bench.params["b"][0, 0] += 1
        return take_walks(tasks, bench)

    return client, quadratic_bench()


def failing_recipe(place: int):
    def client(tasks, bench):
        if tasks[0].round == 3 and place == 1:
            raise ZeroDivisionError("no such number")
        return take_walks(tasks, bench)

    return client, quadratic_bench()


def endless_recipe(place: int):
    """Walks two rounds, then never ends another."""

    def client(tasks, bench):
        while tasks[0].round >= 2:
            time.sleep(0.01)
        return take_walks(tasks, bench)

    return client, quadratic_bench()
