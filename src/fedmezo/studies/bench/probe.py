"""Peak memory of one mode in this process: `python -m fedmezo.studies.bench.probe JSON`, for `memory.py` only.

The answer is one line of JSON on standard output: start_mb, peak_mb, trained_mb (in float32), model_mb, or error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedmezo.errors import FedMeZOError, RunError
from fedmezo.fl.algorithm import Method, Task
from fedmezo.fl.fedavg import descend
from fedmezo.fl.walk import take_walks
from fedmezo.models.load import Loaded
from fedmezo.models.plain import random_llama, with_peft
from fedmezo.studies.bench.inplace import InPlace
from fedmezo.studies.bench.options import BenchOptions, Trained
from fedmezo.studies.bench.subjects import MU, RATE, batch_of, forwards, open_model, our_bench

__all__ = ["main", "peak", "reset_peak"]

Work = Callable[[], object]
STEPS = 2  # the second one takes what the first one left to do
_SMALL = 8
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(device: str) -> float:
    """Returns the peak in MB since `reset_peak`: VmHWM of this process, or on CUDA what torch allocated.

    VmHWM can be reset, unlike ru_maxrss, and a child process does not inherit it.

    Raises:
      RunError: this system does not tell.
    """
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e6
    lines = _STATUS.read_text().splitlines() if _STATUS.is_file() else []
    found = next((line for line in lines if line.startswith("VmHWM")), None)
    if found is None:
        raise RunError("Peak memory cannot be measured here: it needs Linux, whose /proc tells VmHWM.")
    return int(found.split()[1]) * 1024 / 1e6


def reset_peak(device: str) -> None:
    """Sets the peak back to what is in use now, so that loading does not count."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")
    except OSError as error:
        raise RunError(f"Peak memory cannot be measured here: {_CLEAR} is not writable ({error.strerror}).") from error


def _measure(mode: str, asked: BenchOptions, *, dtype: str, tokens: int) -> dict[str, float]:
    # First the same on a model of next to no size: what libraries import, compile and keep is not the work's own.
    small, _ = _work(mode, random_llama("tiny", dtype=dtype, device=asked.device), asked, tokens=_SMALL)
    small()
    loaded = open_model(asked, dtype, copies=2 if mode == "inplace-full" else 1)
    work, trained = _work(mode, loaded, asked, tokens=tokens)
    reset_peak(asked.device)
    start = peak(asked.device)
    work()
    top, size = peak(asked.device), sum(p.numel() * p.element_size() for p in loaded.model.parameters()) / 1e6
    return {"start_mb": start, "peak_mb": top, "trained_mb": 4 * trained / 1e6, "model_mb": size}


def _work(mode: str, loaded: Loaded, asked: BenchOptions, *, tokens: int) -> tuple[Work, int]:
    """Returns what to run, with everything it needs already there, and how many numbers it trains."""
    name, _, train = mode.partition("-")
    batch = batch_of(tokens, loaded.model)
    if mode == "load":
        return lambda: None, 0
    if mode == "forward":
        return partial(forwards, loaded.model, [batch]), 0
    if name in ("step", "sgd", "ckpt", "adamw"):
        return _ours(name, loaded, asked, train="lora" if train == "lora" else "full", tokens=tokens)
    model: nn.Module = with_peft(loaded.model, **asked.lora) if train in ("lora", "peft") else loaded.model
    held = {key: p for key, p in model.named_parameters() if train == "full" or p.requires_grad}
    works: dict[str, Work] = {
        "forward": partial(forwards, model, [batch]),
        "inplace": partial(InPlace(model, held, mu=MU, rate=RATE).step, batch, seed=1),
        "plain_sgd": partial(_descend, model, held, batch),
    }
    return works[name], sum(p.numel() for p in held.values())


def _ours(name: str, loaded: Loaded, asked: BenchOptions, *, train: Trained, tokens: int) -> tuple[Work, int]:
    bench = our_bench(loaded, asked, train=train, lengths=[tokens], checkpointing=name == "ckpt")
    methods: dict[str, Method] = {"step": "walk", "adamw": "adamw"}
    task = Task(0, 0, 0, RATE, MU, STEPS, method=methods.get(name, "sgd"), law=asked.law)
    return partial(take_walks if name == "step" else descend, [task], bench), bench.params.dim


def _descend(model: nn.Module, held: dict[str, nn.Parameter], batch: dict[str, Any]) -> None:
    optimizer = torch.optim.SGD(held.values(), lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()


def main(text: str) -> str:
    """Returns the answer to a question, both one line of JSON."""
    question = json.loads(text)
    asked = BenchOptions(**question["asked"])
    torch.set_num_threads(asked.threads)
    try:
        found: dict[str, Any] = _measure(question["mode"], asked, dtype=question["dtype"], tokens=question["tokens"])
    except FedMeZOError as error:
        found = {"error": str(error)}
    return json.dumps(found)


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1]) + "\n")
