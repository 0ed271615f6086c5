"""Prints what personalised rates did on the built-in model: one line per run, then one per comparison with one rate.

    python scripts/personal_study.py > docs/results/personal.jsonl

Eight clients, labels dealt by a Dirichlet distribution, paired seeds: a seed names data, split, model, batches and
directions, so two runs of one seed differ by their rates alone. About seven minutes on one quiet core.
"""

import json
import sys
from collections.abc import Mapping
from statistics import fmean

import torch

from fedmezo import Settings, fedmezo, load_model
from fedmezo.data.batches import Batches
from fedmezo.data.prompt import encode
from fedmezo.data.skills import skills
from fedmezo.data.split import split
from fedmezo.fl.rates import Personal, with_personal_rates
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.studies.compare.verdicts import paired_interval
from fedmezo.zo.perturb import apply_

SEEDS, CLIENTS, ROUNDS, EVERY = 6, 8, 24, 4
WALK = Settings(rate=1e-3, steps=5)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
HELD_OUT = ("routing", "follows", "pairs", "extract")  # the built-in model has never seen these tasks
ARMS: Mapping[str, Personal | None] = {
    "none": None,
    "random": Personal("random"),
    "round-loss": Personal("round-loss"),
    "five-round-loss": Personal("five-round-loss"),
    "update-difference": Personal("update-difference"),
    "heterogeneity": Personal("heterogeneity", window=5),
    "five-round-loss reversed": Personal("five-round-loss", alpha=-0.5),
    "five-round-loss shuffled": Personal("five-round-loss", shuffle=True),
    "update-difference shuffled": Personal("update-difference", shuffle=True),
}


def bench_of(seed: int) -> tuple[ModelBench, tuple[object, ...]]:
    """Returns the untrained model on this seed's data, and the common evaluation set."""
    loaded = load_model("builtin:tiny")
    records = skills(count=700, seed=100 + seed, categories=HELD_OUT)
    examples = encode(records, loaded.tokenizer, template="{instruction}\n{input} ", max_tokens=96).examples
    train, judged = examples[150:], examples[:150]
    parts = split("lda", [example.category for example in train], clients=CLIENTS, seed=seed, alpha=0.1)
    batches = Batches([[train[i] for i in part] for part in parts], batch_size=2, local_steps=WALK.steps, seed=seed)
    adapter = make_adapter(loaded.model, kind="lora", rank=8, alpha=16, targets=LINEARS)
    return ModelBench(loaded, adapter, batches=batches, seed=seed), judged


def play(personal: Personal | None, seed: int) -> dict[str, object]:
    """Returns the losses of one run, and the lowest and highest rate over the plain one."""
    bench, judged = bench_of(seed)
    plain = fedmezo(WALK, seed=seed, cohort=CLIENTS)
    algorithm = with_personal_rates(plain, personal, seed=seed, rate=WALK.rate) if personal else plain
    state, losses, rates = algorithm.init(), [bench.evaluate(judged).loss], []
    for number in range(ROUNDS):
        tasks = algorithm.plan(state, range(CLIENTS))
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law=WALK.law)
        rates += [task.rate / WALK.rate for task in tasks]
        if (number + 1) % EVERY == 0:
            losses.append(bench.evaluate(judged).loss)
    factors = [round(part, 3) for part in (min(rates), fmean(rates), max(rates))]
    return {"losses": [round(loss, 4) for loss in losses], "factors": factors}


def main() -> None:
    """Runs every arm with every seed and compares each with the plain one."""
    torch.set_num_threads(1)
    ends: dict[str, list[float]] = {arm: [] for arm in ARMS}
    means: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in range(SEEDS):
        for arm, personal in ARMS.items():
            row = play(personal, seed)
            losses = [float(loss) for loss in row["losses"]]  # type: ignore[attr-defined]
            ends[arm].append(losses[-1])
            means[arm].append(fmean(losses[1:]))
            print(json.dumps({"arm": arm, "seed": seed, **row}), flush=True)
    for arm in ARMS:
        if arm != "none":
            print(json.dumps({"arm": arm, "minus": "none", **compared(ends, arm), **compared(means, arm, "mean_")}))
    sys.stdout.flush()


def compared(found: Mapping[str, list[float]], arm: str, name: str = "end_") -> dict[str, list[float]]:
    """Returns the mean paired difference from one rate for all, with its 95 % interval, in nats."""
    differences = [own - plain for own, plain in zip(found[arm], found["none"], strict=True)]
    return {f"{name}difference": [round(part, 4) for part in paired_interval(differences)]}


if __name__ == "__main__":
    main()
