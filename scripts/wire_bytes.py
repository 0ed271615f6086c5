"""What coarse numbers on the wire save, and what they do to the loss: FedKSeed with 4,096 seeds and 200 local steps.

Run: python scripts/wire_bytes.py > docs/results/wire_bytes.jsonl

One row per number format and seed: bytes of one client in the last round, measured on the messages, both ways together,
and the evaluation loss at the end. Every client pulls the pool's sums. "sign" has a rate of its own: its steps are all
as long as a slope of 1 makes them.
"""

import json
import tempfile
from pathlib import Path

from fedmezo.runtime.journal import Journal
from fedmezo.studies.config import load_config
from fedmezo.studies.run import run

BASE = [
    "model.name=builtin:tiny",
    "algorithm.name=fedkseed",
    "algorithm.pool=4096",
    "algorithm.rate=5e-4",
    "federation.pull=sums",
    "federation.clients=4",
    "federation.cohort=2",
    "federation.rounds=5",
    "federation.local_steps=200",
    "eval.every=5",
    "output.report=false",
    "output.export=false",
    "output.tensorboard=false",
    "runtime.threads=1",
]
FORMATS = {
    "float32": ["algorithm.coding=float32", "federation.sums_coding=float32"],
    "float16": ["algorithm.coding=float16", "federation.sums_coding=float16"],
    "sign up, float16 down": ["algorithm.coding=sign", "federation.sums_coding=float16", "algorithm.rate=2e-3"],
}


def main() -> None:
    """Prints one JSON object per run."""
    for name, keys in FORMATS.items():
        for seed in (0, 1, 2):
            config = load_config(None, [*BASE, *keys, f"federation.seed={seed}"])
            with tempfile.TemporaryDirectory() as folder:
                summary = run(config, out=Path(folder) / "run")
                with Journal.open(Path(folder) / "run" / "journal.sqlite", readonly=True) as journal:
                    last = journal.round(journal.last - 1).entries[0]
            row = {
                "format": name,
                "seed": seed,
                "bytes_down": last.bytes_down,
                "bytes_up": last.bytes_up,
                "bytes": last.bytes_down + last.bytes_up,
                "rate": summary.rate,
                "loss_start": summary.eval["start"]["loss"],
                "loss_end": summary.eval["end"]["loss"],
            }
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
