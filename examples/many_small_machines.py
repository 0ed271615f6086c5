"""Three ways to need less: frozen weights in 8 bits, all weights trained in bfloat16, many clients over two processes.

python examples/many_small_machines.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import fedmezo

COMMON = [
    "model.name=builtin:tiny",
    "data.limit=400",
    "federation.local_steps=5",
    "federation.rounds=4",
    "eval.every=4",
]
RUNS = {
    "LoRA over a base in 8 bits": ["model.quantize=int8", "federation.clients=4", "algorithm.rate=5e-4"],
    "all weights, in bfloat16": [
        "adapter.kind=full",
        "model.dtype=bfloat16",
        "federation.clients=2",
        "algorithm.rate=1e-5",
    ],
    "100 clients, 10 a round, two processes": [
        "federation.clients=100",
        "federation.cohort=10",
        "runtime.workers=2",
        "runtime.lanes=2",
        "runtime.threads=1",
        "algorithm.rate=5e-4",
    ],
}

for name, changes in RUNS.items():
    with TemporaryDirectory() as folder:
        config = fedmezo.load_config(overrides=[*COMMON, *changes])
        summary = fedmezo.run(config, out=Path(folder) / "run")
        checked = fedmezo.verify(Path(folder) / "run")["ok"]
        print(
            f"{name}: loss {summary.eval['start']['loss']:.3f} -> {summary.eval['end']['loss']:.3f}, "
            f"{summary.bytes['up_per_client_round']:.0f} bytes up per client and round, replay "
            f"{'equal' if checked else 'DIFFERS'}"
        )
