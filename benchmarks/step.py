"""A two-point LoRA step against two plain Hugging Face forwards of the same batch, interleaved in one run.

    python benchmarks/step.py [--model smollm2-135m] [--dtype float32] [--rank 8] [--threads 1] [--repeats 7] [--json]

The batch is one row, 60 % of it prompt. Prints medians of CPU seconds and their ratio; below 1 the whole step (noise,
both losses, update) costs less than two forwards that keep the logits of every position.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from fedmezo.data.batches import Batches
from fedmezo.data.prompt import Example, Row
from fedmezo.fl.algorithm import Task
from fedmezo.fl.walk import take_walks
from fedmezo.models.adapters import make_adapter
from fedmezo.models.bench import ModelBench
from fedmezo.models.load import load_model


def medians(functions: list[Callable[[], object]], *, repeats: int) -> list[float]:
    """Returns each function's median CPU seconds, measured in turn after one warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, mine in zip(functions, times, strict=True):
            began = time.process_time()
            function()
            if repeat:
                mine.append(time.process_time() - began)
    return [statistics.median(mine) for mine in times]


def measure(model: str, *, dtype: str, rank: int, tokens: int, repeats: int) -> dict[str, object]:
    """Returns one row: seconds of two forwards, of a step, and the ratio."""
    plain, loaded = load_model(model, dtype=dtype), load_model(model, dtype=dtype)
    ids = tuple((torch.arange(tokens) * 7919 % 5000 + 10).tolist())
    batches = Batches([[Example(rows=(Row(ids, tokens * 6 // 10),))]], batch_size=1, local_steps=1, seed=0)
    adapter = make_adapter(loaded.model, kind="lora", rank=rank, alpha=2 * rank, targets=("q_proj", "v_proj"))
    bench = ModelBench(loaded, adapter, batches=batches)
    batch = torch.tensor([ids])

    def two_forwards() -> None:
        with torch.inference_mode():
            for _ in range(2):
                plain.model(input_ids=batch, labels=batch)

    def step() -> None:
        take_walks([Task(0, 0, 0, 1e-4, 1e-3, 1)], bench)

    base, ours = medians([two_forwards, step], repeats=repeats)
    return {
        "name": "lora-step",
        "dtype": dtype,
        "tokens": tokens,
        "rank": rank,
        "two_forwards_s": round(base, 4),
        "step_s": round(ours, 4),
        "ratio_two_forwards": round(ours / base, 3),
    }


def main() -> None:
    """Measures 64 and 256 tokens and prints the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = [
        measure(args.model, dtype=args.dtype, rank=args.rank, tokens=tokens, repeats=args.repeats)
        for tokens in (64, 256)
    ]
    if args.json:
        print(json.dumps({"threads": args.threads, "torch": torch.__version__, "rows": rows}))
        return
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
