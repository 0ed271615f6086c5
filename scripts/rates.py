"""How near `rate = "auto"` comes to the best rate of a grid, task by task, over three seeds.

Run: FEDMEZO_DATA=... python scripts/rates.py --out runs/rates [--task NAME,...] [--arm grid,auto,high] [--seed N,...] [--only PLACE,...]

The grid has seven rates over two decades, with 0.3 / sqrt(d) in the middle. All else is as the library sets it when it
is not told, so a rate of the grid is constant, and an adapted one falls in the second half of its run. The grid that
docs/results/rates.jsonl records had an earlier guard, which halved the rate and judged no batches.

The arm "high" takes 10 and 30 times the grid's best rate, to see the guard end it below its start. Every run leaves one
line in OUT/rates.jsonl; a second call does what is missing.
"""

import argparse
import json
import math
import tempfile
import time
from pathlib import Path

from fedmezo.studies.config import load_config
from fedmezo.studies.run import run

ROOT = Path(__file__).resolve().parent.parent
STEPS = tuple(10 ** (power / 3) for power in range(-3, 4))
SEEDS = (0, 1, 2)
BEST = {"sst2": 4.42e-3, "gsm8k": 2.05e-3, "tiny": 2.51e-3, "tiny-full": 6.98e-5}  # of the grid, by the mean over seeds
QUIET = ["output.report=false", "output.export=false", "output.tensorboard=false", "runtime.threads=1"]
SHORT = ["federation.rounds=12", "federation.local_steps=10", "algorithm.decay=auto", "eval.every=12"]
DATA = "data.path=${FEDMEZO_DATA}"
SMOLLM2 = ["model.name=smollm2-135m", "model.dtype=bfloat16", "adapter.rank=8", "adapter.alpha=16"]
TINY = ["model.name=builtin:tiny", "data.limit=1200", "data.eval_examples=200", "federation.clients=4",
        "federation.batch_size=2", "federation.rounds=40", "federation.local_steps=5", "eval.every=40"]  # fmt: skip
# name -> configuration, changes to it, trained parameters
TASKS: dict[str, tuple[str | None, list[str], int]] = {
    "sst2": ("sst2", [*SHORT], 460_800),
    "gsm8k": ("gsm8k", [*SHORT, "data.max_tokens=128", "data.eval_examples=64", "eval.examples=64"], 460_800),
    "natural-instructions": (
        "natural-instructions",
        [*SHORT, "algorithm.name=fedmezo", "data.max_tokens=128", "eval.examples=96", 'eval.metrics=["loss"]'],
        460_800,
    ),
    "alpaca": (
        None,
        [*SMOLLM2, *SHORT, f"{DATA}/alpaca/alpaca_random9k.dev.jsonl.gz", "data.preset=alpaca", "data.limit=3000",
         "data.max_tokens=128", "data.eval_examples=96", "eval.examples=96"],
        460_800,
    ),
    "alpaca-long": (
        None,
        [*SMOLLM2, *SHORT, "federation.rounds=60", "eval.every=60", f"{DATA}/alpaca/alpaca_random9k.dev.jsonl.gz",
         "data.preset=alpaca", "data.limit=3000", "data.max_tokens=128", "data.eval_examples=96", "eval.examples=96"],
        460_800,
    ),
    "rte": (
        None,
        [*SMOLLM2, *SHORT, f"{DATA}/superglue/rte.train.jsonl.gz", 'data.choices=["entailment","not_entailment"]',
         'data.columns={instruction="sentence1",input="sentence2",output="label"}', "data.max_tokens=160",
         "data.eval_examples=200"],
        460_800,
    ),
    "tiny": (None, TINY, 14_336),
    "tiny-full": (None, [*TINY, "adapter.kind=full"], 857_216),
}  # fmt: skip


def keys(task: str, *, seed: int, rate: float | None) -> list[str]:
    """Returns the changes of one run; a rate of None is "auto"."""
    told = "auto" if rate is None else repr(rate)
    names = [f"federation.seed={seed}", f"data.seed={seed}", f"algorithm.rate={told}", "algorithm.mu=auto"]
    return [*TASKS[task][1], *QUIET, *names]


def row(task: str, *, seed: int, rate: float | None, arm: str) -> dict[str, object]:
    """Runs one and returns its line."""
    source = TASKS[task][0]
    config = load_config(ROOT / f"configs/{source}.toml" if source else None, keys(task, seed=seed, rate=rate))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        summary = run(config, out=Path(folder) / "run")
    start, end = (summary.eval[when]["loss"] for when in ("start", "end"))
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "rate": summary.rate,
        "mu": summary.mu,
        "dim": summary.dim,
        "start": start,
        "end": end if math.isfinite(end) else None,
        "forwards": summary.forwards,
        "looks": summary.looks,
        "taken_back": summary.taken_back,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> None:
    """Does the runs that are missing."""
    asked = argparse.ArgumentParser()
    asked.add_argument("--out", type=Path, required=True)
    asked.add_argument("--task", default=",".join(TASKS))
    asked.add_argument("--arm", default="grid,auto")
    asked.add_argument("--seed", default=",".join(map(str, SEEDS)))
    asked.add_argument("--only", default="0,1,2,3,4,5,6", help="places in the grid")
    given = asked.parse_args()
    places = set(map(int, given.only.split(",")))
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "rates.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(one["task"], one["seed"], one["asked"], one["arm"]) for one in lines}
    for seed in map(int, given.seed.split(",")):
        for task in given.task.split(","):
            steps = [step for place, step in enumerate(STEPS) if place in places]
            grid = [float(f"{step * 0.3 / math.sqrt(TASKS[task][2]):.3g}") for step in steps]
            high = [float(f"{times * BEST[task]:.3g}") for times in (10, 30)] if task in BEST else []
            for arm, rates in {"grid": grid, "auto": [None], "high": high}.items():
                for rate in rates if arm in given.arm else ():
                    if (task, seed, rate, arm) not in done:
                        with kept.open("a") as file:
                            file.write(json.dumps({**row(task, seed=seed, rate=rate, arm=arm), "asked": rate}) + "\n")


if __name__ == "__main__":
    main()
