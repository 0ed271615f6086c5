"""An aggregation of one's own: a wrapper that takes any algorithm and returns one. Runs in seconds.

python examples/custom_aggregation.py [FOLDER]

Three of four clients have right answers, the fourth has random letters. The wrapper leaves out, round by round, the
client with the largest loss. What it struck out is not in the journal either, so nobody can add it back. So few rounds
do not tell the two runs' losses apart; what is shown is who counted.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fedmezo import Journal, build, load_config, run, verify
from fedmezo.fl.algorithm import Algorithm, Reply, Task

S = TypeVar("S")
COLOURS = {"lamp": "red", "grass": "green", "sky": "blue", "snow": "white", "coal": "black", "lemon": "yellow"}
CLIENTS = ("a", "b", "c", "careless")


def without_the_worst(algorithm: Algorithm[S]) -> Algorithm[S]:
    """Returns the algorithm in which the reply with the largest loss of a round does not count."""

    def gather(tasks: Sequence[Task], replies: Sequence[Reply]) -> tuple[Sequence[Task], Sequence[Reply]]:
        tasks, replies = algorithm.gather(tasks, replies)
        worst = max(replies, key=lambda reply: reply.loss)
        return [t for t in tasks if t.client != worst.client], [r for r in replies if r.client != worst.client]

    return replace(algorithm, gather=gather)


folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/custom-aggregation")
folder.mkdir(parents=True, exist_ok=True)
draw = random.Random(0)


def record(client: str, thing: str, number: int) -> dict[str, str]:
    """Returns one record of a client."""
    answer = "".join(draw.choices("bcdfghjklmnpqrstvwxz", k=6)) if client == "careless" else COLOURS[thing]
    return {"instruction": "Which colour?", "input": f"{thing} {number}", "output": answer, "category": client}


files = {"train": CLIENTS, "judge": ("a",)}
for name, clients in files.items():
    first = 20 if name == "judge" else 0
    rows = [record(client, thing, first + n) for client in clients for n in range(20) for thing in COLOURS]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

config = load_config(
    None,
    [
        "model.name=builtin:tiny", f"data.path={folder / 'train.jsonl'}", f"data.eval_path={folder / 'judge.jsonl'}",
        "data.template={instruction} {input} is", "split.kind=natural", f"federation.clients={len(CLIENTS)}",
        "federation.rounds=10", "federation.local_steps=6", "federation.batch_size=4", "algorithm.rate=4e-3",
        "guard.batches=0", "eval.every=10", "output.report=false",
    ],
)  # fmt: skip
counts = {}
for name, wrap in {"mean of all": lambda algorithm: algorithm, "without the worst": without_the_worst}.items():
    built = build(config)
    where = folder / name.replace(" ", "-")
    summary = run(replace(built, algorithm=wrap(built.algorithm)), out=where)
    with Journal.open(where / "journal.sqlite", readonly=True) as journal:
        counts[name] = Counter(CLIENTS[entry.task.client] for done in journal.rounds() for entry in done.entries)
    print(f"{name}: loss {summary.eval['start']['loss']:.3f} -> {summary.eval['end']['loss']:.3f}")
    print("  rounds in which each client counted:", dict(sorted(counts[name].items())))
    assert verify(where)["digest"] == summary.digest
print("the careless client counted in no round:", counts["without the worst"]["careless"] == 0)
