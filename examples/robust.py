"""A fifth of the clients sends the opposite of what it measured, a millionfold: the mean, and what stands in for it.

python examples/robust.py
"""

from collections.abc import Sequence
from dataclasses import replace

from fedmezo import Settings, fedmezo, load_model, with_robust_mean
from fedmezo.data.batches import Batches
from fedmezo.data.prompt import encode
from fedmezo.data.skills import skills
from fedmezo.fl.aggregate import uniform_weights
from fedmezo.fl.algorithm import Bench, Reply, Task
from fedmezo.fl.robust import krum
from fedmezo.fl.walk import take_walks
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.zo.perturb import apply_

CLIENTS, LIARS, ROUNDS = range(5), (2,), 10


def some_lie(tasks: Sequence[Task], bench: Bench) -> list[Reply]:
    """Returns the honest replies of most, and of the liars' what would undo them."""
    honest = take_walks(tasks, bench)
    wrong = [replace(reply, slopes=tuple(-1e6 * slope for slope in reply.slopes)) for reply in honest]
    return [lie if lie.client in LIARS else reply for lie, reply in zip(wrong, honest, strict=True)]


loaded = load_model("builtin:tiny")
records = skills(count=500, seed=1, categories=["routing", "priority"])
encoded = encode(records, loaded.tokenizer, template="{instruction}\n{input} ", max_tokens=96, objective="choices")
examples = encoded.examples
train, held_out = examples[100:], examples[:100]
# Shared directions: all clients of a round try the same ones, so that their slopes can be compared one by one.
settings = Settings(rate=4e-3, steps=3, shared=True)
parts = [train[client :: len(CLIENTS)] for client in CLIENTS]
adapter = make_adapter(loaded.model, kind="lora", rank=8, alpha=16, targets=["q_proj", "v_proj"])

plain = fedmezo(settings, seed=0, cohort=len(CLIENTS))
rules = {
    "mean, as in the paper": fedmezo(replace(settings, clip=float("inf")), seed=0, cohort=len(CLIENTS)),
    "mean of clipped slopes": plain,
    "median": with_robust_mean(plain, "median"),
    "trimmed mean": with_robust_mean(plain, "trimmed-mean", share=0.2),
    "multi-Krum": fedmezo(settings, seed=0, cohort=len(CLIENTS), weights=krum(uniform_weights, share=0.2)),
}
for name, algorithm in rules.items():
    bench = ModelBench(loaded, adapter, batches=Batches(parts, batch_size=4, local_steps=settings.steps, seed=0))
    state, start = algorithm.init(), bench.evaluate(held_out).loss
    for _ in range(ROUNDS):
        asked = algorithm.plan(state, CLIENTS)
        # `gather` is where a rule makes one walk of all; replies from outside go through it before all else.
        tasks, replies = algorithm.gather(asked, some_lie(asked, bench))
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law=settings.law)
    print(f"{name:24} loss {start:.3f} -> {bench.evaluate(held_out).loss:.3f}")
