"""The small study behind test_convergence.py: tiny model, tasks whose answers it has never seen."""

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F

from fedmezo.data.batches import Batches
from fedmezo.data.prompt import Example, encode
from fedmezo.data.skills import skills
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


class StudyBench(ModelBench):
    """A bench that can also differentiate, for comparison with backpropagation."""

    def gradient(self, *, client: int, round_number: int, step: int) -> dict[str, torch.Tensor]:
        """Returns the gradient of one batch's loss at the global parameters, by backpropagation through plain torch."""
        leaves = {name: t.detach().clone().requires_grad_(True) for name, t in self.params}
        batch = self._batches(client, round_number, step)
        total, count = torch.zeros(()), 0
        for example in batch:
            row = example.rows[0]
            logits = lora_forward(self, leaves, torch.tensor([row.ids]))
            total = total + F.cross_entropy(
                logits[0, row.start - 1 : -1], torch.tensor(row.ids[row.start :]), reduction="sum"
            )
            count += len(row.ids) - row.start
        names = list(leaves)
        return dict(zip(names, torch.autograd.grad(total / count, [leaves[n] for n in names]), strict=True))


def lora_forward(bench: ModelBench, leaves: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Returns the logits of the plain model with W + scale B A in place of W, differentiable in A and B."""
    model = bench._loaded.model
    weights = {}
    for site in bench.adapter.sites:
        base = model.get_submodule(site.module).weight
        weights[f"{site.module}.weight"] = base + site.scale * leaves[site.b] @ leaves[site.a]
    return torch.func.functional_call(model, weights, (ids,), {"use_cache": False}, tie_weights=True).logits


@cache
def loaded():
    return load_model("builtin:tiny")


def examples(*, count: int, seed: int) -> tuple[Example, ...]:
    records = skills(count=count, seed=seed, categories=HELD_OUT)
    return encode(records, loaded().tokenizer, template="{instruction}\n{input} ", max_tokens=96).examples


@cache
def evaluation() -> tuple[Example, ...]:
    return examples(count=100, seed=7)


def bench_for(*, clients: int = 4, steps: int = 5, seed: int = 0, kind: str = "lora", batch: int = 2) -> StudyBench:
    base = load_model("builtin:tiny") if kind == "full" else loaded()
    train = examples(count=400, seed=100 + seed)
    batches = Batches([train[c::clients] for c in range(clients)], batch_size=batch, local_steps=steps, seed=seed)
    adapter = make_adapter(base.model, kind=kind, rank=8, alpha=16, targets=LINEARS)
    return StudyBench(base, adapter, batches=batches, seed=seed)


@cache
def start_loss() -> float:
    return bench_for().evaluate(evaluation()).loss


def federate(
    settings: Settings, *, rounds: int, clients: int = 4, seed: int = 0, kind: str = "lora", guard=False
) -> History:
    bench = bench_for(clients=clients, steps=settings.steps, seed=seed, kind=kind)
    algorithm = fedmezo(settings, seed=seed, cohort=clients)
    state, watch, surged, losses = algorithm.init(), Guard(), False, []
    start = bench.evaluate(evaluation()).loss
    for number in range(rounds):
        replies = algorithm.client(algorithm.plan(state, range(clients)), bench)
        state, update = algorithm.aggregate(state, replies)
        apply_(bench.params, update, law=settings.law)
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
    bench = bench_for(clients=clients, steps=settings.steps, seed=seed)
    for number in range(rounds):
        before, total = bench.params.clone(), {name: torch.zeros_like(t) for name, t in bench.params}
        for client in range(clients):
            bench.params.copy_(before)
            for step in range(settings.steps):
                gradient = bench.gradient(client=client, round_number=number, step=step)
                for name, tensor in bench.params:
                    tensor.sub_(gradient[name], alpha=settings.rate)
            for name, tensor in bench.params:
                total[name] += tensor / clients
        for name, tensor in bench.params:
            tensor.copy_(total[name])
    return bench.evaluate(evaluation()).loss
