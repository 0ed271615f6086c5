"""Four algorithms on one bench: the same clients, batches and evaluation; only the algorithm is another value.

python examples/family.py
"""

from dataclasses import replace

from fedmezo import Pool, Settings, fedavg, fedkseed, fedmezo, load_model
from fedmezo.data.batches import Batches
from fedmezo.data.prompt import encode
from fedmezo.data.skills import skills
from fedmezo.data.split import split
from fedmezo.fl.fedavg import Settings as GradientSettings
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.runtime.wire import encode_reply
from fedmezo.zo.perturb import apply_

CLIENTS, COHORT, ROUNDS, STEPS = range(8), 4, 12, 10

loaded = load_model("builtin:tiny")
records = skills(count=600, seed=1, categories=["pairs", "extract", "routing"])
examples = encode(records, loaded.tokenizer, template="{instruction}\n{input} ", max_tokens=96).examples
train, held_out = examples[100:], examples[:100]
parts = split("lda", [example.category for example in train], clients=len(CLIENTS), seed=0, alpha=0.5)
batches = Batches([[train[i] for i in part] for part in parts], batch_size=2, local_steps=STEPS, seed=0)
adapter = make_adapter(loaded.model, kind="lora", rank=8, alpha=16, targets=["q_proj", "v_proj"])

walk = Settings(rate=5e-4, steps=STEPS)
taking_part = {"seed": 0, "cohort": COHORT}
algorithms = {
    "FedMeZO": fedmezo(walk, **taking_part),
    "FedMeZO, 4 directions, 16-bit slopes": fedmezo(replace(walk, directions=4, coding="float16"), **taking_part),
    "FedKSeed, K = 256": fedkseed(walk, Pool(256), **taking_part),
    "FedKSeed-Pro, K = 256": fedkseed(walk, Pool(256, pro=True), **taking_part),
    "FedAvg, SGD": fedavg(GradientSettings(rate=0.05, steps=STEPS), **taking_part),
}
for name, algorithm in algorithms.items():
    bench = ModelBench(loaded, adapter, batches=batches)
    state, sent, start = algorithm.init(), 0, bench.evaluate(held_out).loss
    for _ in range(ROUNDS):
        tasks = algorithm.plan(state, CLIENTS)
        replies = algorithm.client(tasks, bench)
        state, update = algorithm.aggregate(state, tasks, replies)
        apply_(bench.params, update, law=walk.law)
        sent += sum(len(encode_reply(reply)) for reply in replies)
    loss = bench.evaluate(held_out).loss
    print(
        f"{name}: loss {start:.3f} -> {loss:.3f}, {bench.forwards} forward passes, {sent / ROUNDS / COHORT:,.0f} bytes "
        "up per client and round"
    )
