"""Peak memory of each mode, each in a process of its own, and the limit that a LoRA step has to keep."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedmezo.errors import ModelError, RunError
from fedmezo.studies.bench.options import BenchOptions
from fedmezo.studies.bench.rows import Frame, Row

__all__ = ["LIMIT", "MODES", "broken", "memory_rows", "probe"]

TOKENS = 256

# glibc may keep 100 MB of what backpropagation freed; MALLOC_MMAP_THRESHOLD_=262144 in the environment makes it give
# large blocks back at once.
MODES: Mapping[str, str] = {
    "load": "nothing, the model loaded",
    "forward": "plain forward",
    "forward-peft": "plain forward with PEFT's adapter attached",
    "step-lora": "lora, our step",
    "inplace-lora": "lora, in-place scheme",
    "sgd-lora": "lora, FedAvg sgd",
    "ckpt-lora": "lora, FedAvg sgd, gradient checkpointing",
    "adamw-lora": "lora, FedAvg adamw",
    "plain_sgd-lora": "lora, plain PEFT sgd",
    "step-full": "full, our step",
    "inplace-full": "full, in-place scheme",
    "sgd-full": "full, FedAvg sgd",
    "adamw-full": "full, FedAvg adamw",
}
_NEEDED = ("load", "forward", "forward-peft", "step-lora", "step-full")
_FLOAT32_ONLY = ("sgd-full", "adamw-full")

LIMIT = 1.05
# Below, and in 16 bits, the 100 MB that compiling the noise takes outweigh the rest.
_JUDGED_TOKENS, _JUDGED_MB = 256, 100.0
_COMPARED = "lora, peak of our step over plain forward and adapter"
_LIMITED = f"{_COMPARED}, limit {LIMIT}"


def memory_rows(asked: BenchOptions, *, say: Callable[[str], None]) -> Iterator[Row]:
    """Yields two rows per mode: the peak of its process, and how far it rises over model, adapter and libraries.

    Memory is the peak resident set (VmHWM, reset after loading), on CUDA what torch allocated at most. A plain forward
    holds as much at its peak as two of them, one after the other.
    """
    for dtype in asked.dtypes_or("float32", "bfloat16"):
        for tokens in asked.tokens_or(TOKENS):
            found: dict[str, Any] = {}
            for mode in _modes(asked, dtype):
                say(f"memory: {MODES[mode]}, {dtype}, {tokens} tokens")
                found[mode] = probe(mode, asked, dtype=dtype, tokens=tokens)
                if mode == "load" and "error" in found[mode]:
                    raise ModelError(found[mode]["error"])
            for mode, one in found.items():
                yield from _rows(mode, one, found, frame=Frame("memory", dtype, tokens))
            yield from _limit(found, asked, frame=Frame("memory", dtype, tokens))


def _modes(asked: BenchOptions, dtype: str) -> list[str]:
    wanted = [mode for mode in MODES if mode.endswith(asked.train) or mode in ("load", "forward", "forward-peft")]
    return [mode for mode in wanted if dtype == "float32" or mode not in _FLOAT32_ONLY]


def _rows(mode: str, one: dict[str, Any], found: Mapping[str, Any], *, frame: Frame) -> Iterator[Row]:
    name = MODES[mode]
    if "error" in one:
        yield frame.missing(name, one["error"])
        return
    plain, other = found["forward"], found.get(f"inplace-{mode.partition('-')[2]}", {})
    frame = frame.against(base=plain.get("peak_mb"), inplace=other.get("peak_mb"))
    yield frame.row(f"{name}, peak", one["peak_mb"], unit="MB")
    frame = frame.against(base=_extra(plain), inplace=_extra(other))
    yield frame.row(f"{name}, extra over loaded", _extra(one), unit="MB")


def _extra(one: Mapping[str, Any]) -> float | None:
    return one["peak_mb"] - one["start_mb"] if "peak_mb" in one else None


def probe(mode: str, asked: BenchOptions, *, dtype: str, tokens: int) -> dict[str, Any]:
    """Returns start_mb, peak_mb, trained_mb and model_mb of a mode, or the error that kept it from running.

    Raises:
      RunError: the process of a mode that others are compared with ended without an answer.
    """
    question = json.dumps({"mode": mode, "asked": asdict(asked), "dtype": dtype, "tokens": tokens})
    done = subprocess.run(
        [sys.executable, "-m", "fedmezo.studies.bench.probe", question], capture_output=True, text=True, check=False
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        text = f"The process that measures {MODES[mode]!r} ended with code {done.returncode}: {said}"
        if mode in _NEEDED:
            raise RunError(text)
        return {"error": text}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _limit(found: Mapping[str, Any], asked: BenchOptions, *, frame: Frame) -> Iterator[Row]:
    """Yields our LoRA step's peak over that of a plain forward plus the float32 adapter."""
    step, plain = found.get("step-lora", {}), found["forward-peft"]
    if "peak_mb" not in step or "peak_mb" not in plain:
        return
    large = frame.tokens >= _JUDGED_TOKENS and step["model_mb"] >= _JUDGED_MB
    judged = large and asked.device == "cpu" and frame.dtype == "float32"
    value = step["peak_mb"] / (plain["peak_mb"] + step["trained_mb"])
    yield frame.plain(_LIMITED if judged else _COMPARED, value, unit="x")


def broken(rows: Sequence[Row]) -> list[str]:
    """Returns a sentence per row that breaks the limit on the peak of our LoRA step."""
    name = f"memory: {_LIMITED}"
    return [
        f"A LoRA step at {row.tokens} tokens in {row.dtype} needs {row.value:.3f} times the memory of a plain forward "
        f"and the adapter, more than {LIMIT}: a regression."
        for row in rows
        if row.name == name and row.value is not None and row.value > LIMIT
    ]
