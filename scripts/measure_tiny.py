"""Prints the figures behind the thresholds of tests/test_convergence.py, over three seeds.

make measure
"""

import json
import math
import time

import torch
from tiny_study import backprop, federate, start_loss

from fedmezo.fl.fedmezo import Settings

COMMON = Settings(rate=5e-4, mu=1e-3, steps=5, clip=3.0)


def row(name: str, **figures: object) -> None:
    print(json.dumps({"test": name, **figures}), flush=True)


def main() -> None:
    torch.set_num_threads(1)
    row("start", loss=round(start_loss(), 4))
    for seed in range(3):
        began = time.process_time()
        for name, rounds in (("T1", 20), ("T2", 40), ("T3", 80)):
            history = federate(COMMON, rounds=rounds, seed=seed)
            row(name, seed=seed, end=round(history.end, 3), drop=round(history.start - history.end, 3))
        history = federate(Settings(rate=1e-4, steps=50), rounds=1, clients=1, seed=seed, kind="full")
        row("T4", seed=seed, drop=round(history.start - history.end, 3))
        for clip in (math.inf, 3.0):
            wild = Settings(rate=1e-3, steps=10, clip=clip)
            history = federate(wild, rounds=8, clients=1, seed=seed, kind="full", guard=True)
            row("T5", seed=seed, clip=str(clip), end=round(history.end, 3), surged=history.surged)
        settings = Settings(rate=1e-4, steps=10, clip=math.inf)
        ours, theirs = federate(settings, rounds=12, seed=seed), backprop(settings, rounds=12, seed=seed)
        row("T6", seed=seed, start=round(ours.start, 4), forward_only=round(ours.end, 4), backprop=round(theirs, 4))
        row("seconds", seed=seed, cpu=round(time.process_time() - began, 1))


if __name__ == "__main__":
    main()
