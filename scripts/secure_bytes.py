"""The bytes of a secure round, per client, by clients and local steps: Flower's protocol inside this process.

Run: python scripts/secure_bytes.py > docs/results/secure_bytes.jsonl

The grid is that of the tests; payloads are counted as the journal has them, without Flower's own framing, in the last
of two rounds of the built-in model, the sum of the first coming down by pairs.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from fake_flower import FakeGrid

from fedmezo import ClientOptions, build_resident, flower_client, run
from fedmezo.runtime.flower import shim
from fedmezo.runtime.flower.line import FlowerLine
from fedmezo.runtime.journal import Journal
from fedmezo.studies.config import load_config


def measured(clients: int, steps: int) -> dict[str, float]:
    """Returns what a round takes."""
    settings = ["model.name=builtin:tiny", "data.limit=200", "data.eval_examples=5", f"federation.clients={clients}",
                "federation.rounds=2", f"federation.local_steps={steps}", "federation.pull=pairs", "algorithm.shared=true",
                "algorithm.rate=1e-4", "algorithm.mu=1e-3", "network.secure=true",
                "network.secure_clip=50.0", "guard.batches=0", "output.report=false", "output.tensorboard=false"]  # fmt: skip
    answers: list[Callable[[bytes], bytes]] = [build_resident(ClientOptions(client=c)).answer for c in range(clients)]
    shim.ask = lambda path, request, *, patience: answers[int(path.name)](request)
    grid = FakeGrid(flower_client.app, {10 + c: {"worker": f"/nowhere/{c}"} for c in range(clients)})
    with tempfile.TemporaryDirectory() as folder:
        run(load_config(None, settings), out=Path(folder) / "run", line=FlowerLine(grid, ttl=600.0))
        with Journal.open(Path(folder) / "run" / "journal.sqlite", readonly=True) as journal:
            entry = journal.round(1).entries[0]
    return {"clients": clients, "steps": steps, "up": entry.bytes_up / clients, "down": entry.bytes_down / clients}


for clients, steps in ((3, 30), (4, 30), (4, 200), (10, 30)):
    print(json.dumps(measured(clients, steps)), flush=True)
