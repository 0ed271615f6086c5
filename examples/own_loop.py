"""The caller owns the loop: three clients, early stopping, and the adapter saved for plain PEFT. Runs in seconds.

python examples/own_loop.py [FOLDER]
"""

import sys
from datetime import UTC, datetime
from pathlib import Path

from fedmezo import Journal, Settings, __version__, fedmezo, load_model, simulate
from fedmezo.data.batches import Batches
from fedmezo.data.prompt import encode
from fedmezo.data.skills import skills
from fedmezo.data.split import split
from fedmezo.models.adapters import make_adapter, save_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.runtime.journal import Header

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own-loop")
folder.mkdir(parents=True, exist_ok=True)

# Model and data: any records, any template, any split.
loaded = load_model("builtin:tiny")
records = skills(count=600, seed=1, categories=["pairs", "extract"])
examples = encode(records, loaded.tokenizer, template="{instruction}\n{input} ", max_tokens=96).examples
train, held_out = examples[100:], examples[:100]
parts = split("lda", [example.category for example in train], clients=3, seed=0, alpha=0.5)

# The bench holds the model; the algorithm is a value.
settings = Settings(rate=5e-4, steps=10)
batches = Batches([[train[i] for i in part] for part in parts], batch_size=2, local_steps=settings.steps, seed=0)
adapter = make_adapter(loaded.model, kind="lora", rank=8, alpha=16, targets=["q_proj", "v_proj"])
bench = ModelBench(loaded, adapter, batches=batches)
algorithm = fedmezo(settings, seed=0, cohort=3)

header = Header(
    config="{}",
    fingerprint=loaded.fingerprint,
    layout=bench.params.layout(),
    law=settings.law,
    noise_version=1,
    package=__version__,
    created=datetime.now(UTC).isoformat(timespec="seconds"),
)
best = bench.evaluate(held_out).loss
print(f"before: loss {best:.3f}")
with Journal.create(folder / "journal.sqlite", header) as journal:
    for report in simulate(algorithm, bench, journal=journal, clients=range(3), rounds=30):
        if report.round % 5 == 4:
            loss = bench.evaluate(held_out).loss
            print(f"round {report.round + 1}: loss {loss:.3f}, {report.bytes_up} bytes up")
            if loss > best:
                break
            best = loss
save_adapter(folder / "adapter", bench.params, adapter=adapter, base=loaded.source)
