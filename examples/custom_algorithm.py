"""An algorithm of one's own in thirty lines, journaled, resumable and checked like the built-in ones. Runs in seconds.

python examples/custom_algorithm.py [FOLDER]

An algorithm is a frozen record of functions. Here a client looks to one side only, keeps one bit of what it saw,
uphill or downhill, and takes a step of fixed length the other way.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from fedmezo import build, load_config, resume, run, verify
from fedmezo.fl.algorithm import Algorithm, Bench, Point, Reply, Task
from fedmezo.fl.cohort import answers
from fedmezo.fl.pool import directions_of
from fedmezo.fl.walk import walk_of
from fedmezo.studies.build import Built
from fedmezo.zo.perturb import step_
from fedmezo.zo.seedsum import Update


@dataclass(frozen=True)
class State:
    """What the server remembers between rounds."""

    round: int = 0
    factor: float = 1.0


def one_bit_descent(*, rate: float, mu: float, steps: int, seed: int) -> Algorithm[State]:
    """Returns the algorithm; every client takes part in every round."""

    def plan(state: State, clients: Sequence[int]) -> list[Task]:
        return [Task(state.round, client, seed, rate * state.factor, mu, steps) for client in clients]

    def walk(task: Task, bench: Bench) -> Reply:
        bits, losses, examples = [], [], 0
        with bench.open(1) as (params,):
            for step, z in enumerate(directions_of(task).seeds):
                place = (task.client, task.round, step)
                here, there = bench.losses([Point(params, z, 0.0, *place), Point(params, z, task.mu, *place)])
                bits.append(1.0 if there > here else -1.0)
                step_(params, z, coefficient=-task.rate * bits[-1], law=task.law)
                losses.append(here)
                examples += bench.examples(*place)
        return Reply(task.round, task.client, examples, fmean(losses), tuple(bits))

    def aggregate(state: State, tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[State, Update]:
        pairs = answers(tasks, replies, round=state.round)
        walks = tuple(walk_of(task, reply.slopes) for task, reply in pairs)
        return replace(state, round=state.round + 1), Update(walks, (1 / len(pairs),) * len(pairs), state.round)

    def slow_down(state: State, factor: float) -> State:
        return replace(state, factor=state.factor * factor)

    def with_factors(state: State, _: Mapping[int, float]) -> State:
        return state

    def client(tasks: Sequence[Task], bench: Bench) -> list[Reply]:
        return [walk(task, bench) for task in tasks]

    return Algorithm(State, plan, client, aggregate, slow_down, with_factors)


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/custom-algorithm")
config = load_config(
    None,
    [
        "model.name=builtin:tiny", "data.name=builtin:skills/pairs", "data.limit=300", "eval.examples=50",
        "data.template={instruction} {input} ", "federation.rounds=8", "federation.batch_size=4", "guard.batches=0",
    ],
)  # fmt: skip


def mine() -> Built:
    """Returns what a run needs, with our algorithm in the place of the configured one."""
    algorithm = one_bit_descent(rate=2e-3, mu=1e-3, steps=10, seed=config.federation.seed)
    return replace(build(config), algorithm=algorithm)


whole = run(mine(), out=folder / "whole")
print(f"loss {whole.eval['start']['loss']:.3f} -> {whole.eval['end']['loss']:.3f}")

run(mine(), out=folder / "stopped", stop=lambda report: report.round == 4)
resumed = resume(folder / "stopped", built=mine())
print("resumed with the bits of the whole run:", resumed.digest == whole.digest)
print("rebuilt from the journal:", verify(folder / "whole")["digest"] == whole.digest)
