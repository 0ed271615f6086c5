"""What a curious server has: model, tasks, replies, and its own copy of a client; for leak.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from leak_scores import Floats, Row

from fedmezo.data.batches import Batches
from fedmezo.data.prompt import Example
from fedmezo.fl.algorithm import Point, Task
from fedmezo.fl.pool import directions_of
from fedmezo.fl.walk import walk_of
from fedmezo.models.bench import ModelBench
from fedmezo.models.loss import loss_weight
from fedmezo.studies.build import Built, build
from fedmezo.studies.config import load_config, parse_config
from fedmezo.zo.noise import noise
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import step_

HERE = Path(__file__).resolve().parent.parent
KINDS = "builtin:skills/routing,priority,follows,pairs,extract"


@dataclass(frozen=True)
class World:
    """A model, its clients, and the server's own copy, which evaluates one candidate at a time.

    Attributes:
      name: what rows call it.
      built: model, data and algorithm.
      batch: examples per step.
      error: see `alone`; what rounding leaves.
      together: whether candidates share forward passes.
    """

    name: str
    built: Built
    batch: int
    error: float
    together: bool = True

    @property
    def examples(self) -> list[Example]:
        """Every training example."""
        return [example for part in self.built.data.parts for example in part]

    @property
    def batches(self) -> Batches:
        """The run's own batches, of the examples' numbers."""
        sizes, federation = self.built.data.sizes, self.built.config.federation
        ends = np.cumsum([0, *sizes.values()]).tolist()
        parts = [list(range(*pair)) for pair in pairwise(ends)]
        return Batches(parts, batch_size=self.batch, local_steps=federation.local_steps, seed=federation.seed)  # type: ignore[arg-type]

    def own(self, params: Params, seeds: Sequence[int], which: Sequence[int], *, mu: float) -> Floats:
        """Returns [N, n]: the slope of each of these examples, alone, along each direction."""
        examples = self.examples
        bench = ModelBench(
            self.built.loaded, self.built.bench.adapter, params=params, batches=lambda client, *_: (examples[client],)
        )  # fmt: skip
        found = np.empty((len(which), len(seeds)))
        for at, seed in enumerate(seeds):
            points = [Point(bench.params, seed, side, client, 0, 0) for client in which for side in (mu, -mu)]
            # In 16 bits the last bits of a loss go by what else is in the forward pass.
            calls = [points] if self.together else [points[i : i + 2] for i in range(0, len(points), 2)]
            losses = np.array([loss for call in calls for loss in bench.losses(call)])
            found[:, at] = (losses[::2] - losses[1::2]) / (2 * mu)
        return found

    def sizes(self, which: Sequence[int]) -> Floats:
        """Returns what each example weighs in the loss of a batch: its label tokens, or 1."""
        examples = self.examples
        return np.array([loss_weight(examples[at]) for at in which], float)

    def weights(self, which: Sequence[int]) -> Floats:
        """Returns the share that each example would have in the loss of a batch of otherwise average ones."""
        size = self.sizes(which)
        return size / (size + (self.batch - 1) * size.mean())

    def distinct(self, members: Sequence[int], count: int, rng: np.random.Generator) -> list[int]:
        """Returns `count` numbers of examples of the members' clients that are none of the members, nor equal to one."""
        examples, parts = self.examples, self.batches._parts.values()
        homes = [part for part in parts if set(part) & set(members)]
        barred = {example_key(examples[at]) for at in members}
        drawn: list[int] = []
        for at in rng.permutation([int(at) for part in homes for at in part]).tolist():
            key = example_key(examples[at])
            if key not in barred and len(drawn) < count:
                drawn.append(at)
                barred.add(key)
        return drawn


def example_key(example: Example) -> tuple[Any, ...]:
    """Returns what makes an example the same as another."""
    return tuple(row.ids for row in example.rows), example.answer


def tiny(*, batch: int, clients: int = 4, steps: int = 10, adapter: Row | None = None, **sections: Row) -> World:
    """Returns the built-in tiny model on the kinds of tasks whose answers it has never seen, dealt at random."""
    asked = {
        "model": {"name": "builtin:tiny"},
        "adapter": adapter or {"rank": 8},
        "data": {"name": KINDS, "limit": 2400, "template": "plain"},
        "split": {"kind": "iid"},
        "federation": {"clients": clients, "local_steps": steps, "batch_size": batch},
        "runtime": {"threads": 1},
    }
    algorithm = {"mu": 1e-3} | sections.pop("algorithm", {})
    return World("tiny", build(parse_config(asked | {"algorithm": algorithm} | sections), measure=False), batch, 3e-5)


def smollm2(*, batch: int, steps: int) -> World:
    """Returns SmolLM2-135M on SST-2 as configs/sst2.toml has it, but dealt at random."""
    overrides = ["split.kind=iid", "data.limit=3000", f"federation.batch_size={batch}", "runtime.threads=1"]
    overrides += [f"federation.local_steps={steps}", "federation.clients=1"]
    built = build(load_config(HERE / "configs" / "sst2.toml", overrides), measure=False)
    return World("SmolLM2-135M", built, batch, 1e-6, together=False)


@dataclass(frozen=True)
class Look:
    """One step that a server saw.

    Attributes:
      task: what the client was asked.
      params: where it was then.
      seeds: the directions it looked along.
      slopes: what it answered, [n].
      members: the numbers of the examples in its batch.
    """

    task: Task
    params: Params
    seeds: tuple[int, ...]
    slopes: Floats
    members: tuple[int, ...]


def looks(world: World, round_number: int) -> Iterator[list[Look]]:
    """Yields the steps of each client's first round; the name of the round names its directions and batches."""
    algorithm, clients = world.built.algorithm, range(world.built.config.federation.clients)
    tasks = [replace(task, round=round_number) for task in algorithm.plan(algorithm.init(), clients)]
    for task, reply in zip(tasks, algorithm.client(tasks, world.built.bench), strict=True):
        yield list(_steps(world, task, reply.slopes))


def _steps(world: World, task: Task, slopes: Sequence[float]) -> Iterator[Look]:
    named, walk, params = directions_of(task), walk_of(task, slopes), world.built.bench.params.clone()
    batches = world.batches
    for step in range(task.steps):
        ends = slice(step * task.directions, (step + 1) * task.directions)
        members = batches(task.client, task.round, step)
        yield Look(task, params.clone(), named.seeds[ends], np.array(slopes[ends]), members)  # type: ignore[arg-type]
        for seed, coefficient in zip(named.seeds[ends], walk.coefficients[ends], strict=True):
            step_(params, seed, coefficient=coefficient, law=task.law)


def row_of(world: World, **more: Any) -> Row:
    config = world.built.config
    facts = {"model": world.name, "trained": config.adapter.kind, "batch": world.batch}
    return facts | {"directions": config.algorithm.directions, "clients": 1} | more


def matrix(params: Params, seeds: Sequence[int]) -> Floats:
    """Returns the directions as rows, [n, d]."""
    rows = [torch.cat([noise(seed, name, size=tensor.numel()) for name, tensor in params]) for seed in seeds]
    return torch.stack(rows).double().numpy()
