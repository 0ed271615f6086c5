"""A learning rate for each client, from its replies alone: the rates of every round, and the controls. Runs in seconds.

python examples/personal.py
"""

from fedmezo import Personal, Settings, fedmezo, load_model, with_personal_rates
from fedmezo.data.batches import Batches
from fedmezo.data.prompt import encode
from fedmezo.data.skills import skills
from fedmezo.data.split import split
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.zo.perturb import apply_

CLIENTS, ROUNDS = range(4), 8

loaded = load_model("builtin:tiny")
records = skills(count=500, seed=1, categories=["pairs", "extract", "routing", "follows"])
examples = encode(records, loaded.tokenizer, template="{instruction}\n{input} ", max_tokens=96).examples
train, held_out = examples[100:], examples[:100]
parts = split("meta", [example.category for example in train], clients=len(CLIENTS), seed=0)
settings = Settings(rate=1e-3, steps=5)
batches = Batches([[train[i] for i in part] for part in parts], batch_size=2, local_steps=settings.steps, seed=0)
adapter = make_adapter(loaded.model, kind="lora", rank=8, alpha=16, targets=["q_proj", "v_proj"])

# A wrapper takes any algorithm and returns one. The last two are controls.
kinds = {
    "five-round-loss": Personal("five-round-loss"),
    "update-difference": Personal("update-difference"),
    "random": Personal("random"),
    "update-difference, shuffled": Personal("update-difference", shuffle=True),
}
for name, personal in kinds.items():
    bench = ModelBench(loaded, adapter, batches=batches)
    plain = fedmezo(settings, seed=0, cohort=len(CLIENTS))
    algorithm = with_personal_rates(plain, personal, seed=0, rate=settings.rate)
    state, start = algorithm.init(), bench.evaluate(held_out).loss
    print(f"{name}")
    for number in range(ROUNDS):
        tasks = algorithm.plan(state, CLIENTS)
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law=settings.law)
        rates = "  ".join(f"{task.rate:.2e}" for task in tasks)
        print(f"  round {number + 1}: rates {rates}")
    print(f"  loss {start:.3f} -> {bench.evaluate(held_out).loss:.3f}")
