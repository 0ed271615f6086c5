"""Peak memory of a LoRA step against an evaluation forward of the same batch, each in a process of its own.

    python benchmarks/memory.py [--model smollm2-135m] [--tokens 256] [--rank 8] [--json]

`forward` is a plain Hugging Face forward of the batch with the adapter attached by peft, under inference_mode: what
evaluation costs anybody. `step` is two two-point steps of ours: perturb, two lanes, slope, update. The rest is
backpropagation: `sgd`, `sgd-ckpt` (decoder layers computed twice) and `adamw` are two local steps of our FedAvg, whose
logits exist a few label rows at a time; `plain-sgd` is what a plain peft model takes for the same, all logits at once.
Prints one row per mode with the peak resident set (VmHWM) of its process, and the ratio that has to stay below 1.05:
step / (forward + adapter). glibc may keep 100 MB of what backpropagation freed; MALLOC_MMAP_THRESHOLD_=262144 in the
environment makes it give large blocks back at once.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmezo.models.load import Loaded

MODES = ("load", "forward", "step", "sgd", "sgd-ckpt", "adamw", "plain-sgd")
TARGETS = ("q_proj", "v_proj")


def peak_mb() -> float:
    """Returns VmHWM of this process in MB: unlike ru_maxrss it can be reset, and a fork does not inherit it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024 / 1e6
    raise SystemExit("VmHWM is not in /proc/self/status; this benchmark needs Linux.")


def reset_peak() -> None:
    """Sets VmHWM back to the present resident set, so that loading does not count."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(mode: str, *, model: str, tokens: int, rank: int) -> dict[str, float | str]:
    """Returns peak and start figures of one mode; run in a fresh process."""
    import torch

    from fedmezo.models.load import load_model

    torch.set_num_threads(1)
    loaded = load_model(model)
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.clone()  # out of the memory-mapped file, so that every mode holds the weights
    ids = tuple((torch.arange(tokens) * 7919 % 5000 + 10).tolist())
    plain = mode in ("load", "forward", "plain-sgd")
    work, dim = _plain(mode, loaded, ids, rank=rank) if plain else _ours(mode, loaded, ids, rank=rank)
    reset_peak()
    start = peak_mb()
    work()
    return {"mode": mode, "start_mb": start, "peak_mb": peak_mb(), "adapter_mb": 4 * dim / 1e6}


def _ours(mode: str, loaded: "Loaded", ids: tuple[int, ...], *, rank: int) -> tuple[Callable[[], object], int]:
    from fedmezo.data.batches import Batches
    from fedmezo.data.prompt import Example, Row
    from fedmezo.fl.algorithm import Task
    from fedmezo.fl.fedavg import descend
    from fedmezo.fl.walk import take_walks
    from fedmezo.models.adapters import make_adapter
    from fedmezo.models.bench import ModelBench

    batches = Batches([[Example(rows=(Row(ids, _start(ids)),))]], batch_size=1, local_steps=2, seed=0)
    adapter = make_adapter(loaded.model, kind="lora", rank=rank, alpha=2 * rank, targets=TARGETS)
    bench = ModelBench(loaded, adapter, batches=batches, checkpointing=mode == "sgd-ckpt")
    method = {"step": "walk", "adamw": "adamw"}.get(mode, "sgd")
    task = Task(0, 0, 0, 1e-4, 1e-3, 2, method=method)
    return partial(take_walks if mode == "step" else descend, [task], bench), bench.params.dim


def _plain(mode: str, loaded: "Loaded", ids: tuple[int, ...], *, rank: int) -> tuple[Callable[[], object], int]:
    import torch
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    wrapped = get_peft_model(loaded.model, config).eval()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    batch = torch.tensor([ids])
    labels = batch.clone()
    labels[:, : _start(ids)] = -100

    def forward() -> None:
        with torch.inference_mode():
            wrapped(input_ids=batch, labels=batch)

    def descend() -> None:
        optimizer = torch.optim.SGD(trained, lr=1e-4)
        for _ in range(2):
            optimizer.zero_grad()
            wrapped(input_ids=batch, labels=labels).loss.backward()
            optimizer.step()

    works = {"load": lambda: None, "forward": forward, "plain-sgd": descend}
    return works[mode], sum(p.numel() for p in trained)


def _start(ids: tuple[int, ...]) -> int:
    return len(ids) * 6 // 10


def main() -> None:
    """Runs every mode in its own process and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args.mode, model=args.model, tokens=args.tokens, rank=args.rank)))
        return
    common = ["--model", args.model, "--tokens", str(args.tokens), "--rank", str(args.rank)]
    rows = []
    for mode in MODES:
        done = subprocess.run(
            [sys.executable, __file__, "--mode", mode, *common], check=True, capture_output=True, text=True
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    by_mode = {row["mode"]: row for row in rows}
    allowed = by_mode["forward"]["peak_mb"] + by_mode["step"]["adapter_mb"]
    result = {
        "model": args.model,
        "tokens": args.tokens,
        "rank": args.rank,
        "rows": rows,
        "ratio": by_mode["step"]["peak_mb"] / allowed,
        "limit": 1.05,
    }
    if args.json:
        print(json.dumps(result, indent=2))
    else:
        for row in rows:
            print(
                f"{row['mode']:9s} start {row['start_mb']:7.1f} MB  peak {row['peak_mb']:7.1f} MB  adapter {row['adapter_mb']:5.1f} MB"
            )
        print(f"step / (forward + adapter) = {result['ratio']:.3f} (limit {result['limit']})")
    if result["ratio"] > result["limit"]:
        raise SystemExit("A step needs more memory than an evaluation forward and the adapters: a regression.")


if __name__ == "__main__":
    main()
