"""The small study behind test_convergence.py: tiny model, tasks whose answers it has never seen."""

import math
from dataclasses import dataclass
from functools import cache

from fedmezo.data.batches import Batches
from fedmezo.data.prompt import Example, encode
from fedmezo.data.skills import skills
from fedmezo.fl.fedavg import Settings as GradientSettings
from fedmezo.fl.fedavg import fedavg
from fedmezo.fl.fedmezo import Settings, fedmezo
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.models.load import load_model
from fedmezo.runtime.guard import Guard
from fedmezo.zo.perturb import apply_

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HELD_OUT = ("routing", "follows", "pairs", "extract")


@dataclass(frozen=True)
class History:
    start: float
    end: float
    losses: tuple[float, ...]
    surged: bool


@cache
def loaded():
    return load_model("builtin:tiny")


def examples(*, count: int, seed: int) -> tuple[Example, ...]:
    records = skills(count=count, seed=seed, categories=HELD_OUT)
    return encode(records, loaded().tokenizer, template="{instruction}\n{input} ", max_tokens=96).examples


@cache
def evaluation() -> tuple[Example, ...]:
    return examples(count=100, seed=7)


def bench_for(*, clients: int = 4, steps: int = 5, seed: int = 0, kind: str = "lora", batch: int = 2) -> ModelBench:
    base = load_model("builtin:tiny") if kind == "full" else loaded()
    train = examples(count=400, seed=100 + seed)
    batches = Batches([train[c::clients] for c in range(clients)], batch_size=batch, local_steps=steps, seed=seed)
    adapter = make_adapter(base.model, kind=kind, rank=8, alpha=16, targets=LINEARS)
    return ModelBench(base, adapter, batches=batches, seed=seed)


@cache
def start_loss() -> float:
    return bench_for().evaluate(evaluation()).loss


def federate(
    settings: Settings, *, rounds: int, clients: int = 4, seed: int = 0, kind: str = "lora", guard=False
) -> History:
    return play(fedmezo(settings, seed=seed, cohort=clients), settings.steps, rounds, clients, seed, kind, guard=guard)


def play(algorithm, steps: int, rounds: int, clients: int, seed: int, kind: str = "lora", *, guard=False) -> History:
    bench = bench_for(clients=clients, steps=steps, seed=seed, kind=kind)
    state, watch, surged, losses = algorithm.init(), Guard(), False, []
    start = bench.evaluate(evaluation()).loss
    for number in range(rounds):
        tasks = algorithm.plan(state, range(clients))
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law="gaussian")
        losses.append(sum(r.loss for r in replies) / clients)
        if guard:
            watch, now = watch.observe(number, losses[-1])
            surged |= now
    return History(start, bench.evaluate(evaluation()).loss, tuple(losses), surged)


def drop(settings: Settings, *, rounds: int, clients: int = 4, seed: int = 0, kind: str = "lora") -> float:
    history = federate(settings, rounds=rounds, clients=clients, seed=seed, kind=kind)
    return history.start - history.end if math.isfinite(history.end) else -math.inf


def backprop(settings: Settings, *, rounds: int, clients: int = 4, seed: int = 0) -> float:
    """Returns the evaluation loss after the same rounds of local SGD with backpropagation: same batches, same rate."""
    chosen = GradientSettings(settings.rate, settings.steps)
    return play(fedavg(chosen, seed=seed, cohort=clients), settings.steps, rounds, clients, seed).end
