"""Nanoseconds per entry of the noise kernels, against a pass over memory and against fresh Gaussian tensors."""

import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module, util
from types import ModuleType

import torch
from torch import Tensor, nn

from fedmezo.models.read import torch_dtype
from fedmezo.studies.bench.inplace import perturb_
from fedmezo.studies.bench.options import BenchOptions
from fedmezo.studies.bench.rows import Frame, Row
from fedmezo.studies.bench.subjects import batch_of, forwards, open_model
from fedmezo.studies.bench.timing import interleaved, median
from fedmezo.zo.noise import Law

__all__ = ["MEMORY_PASS", "backend_of", "noise_rows"]

ENTRIES = 1 << 24  # 64 MB of float32: more than the caches hold
TOKENS = 64
MEMORY_PASS = "one pass over memory (mul_)"
LAWS: tuple[Law, ...] = ("gaussian", "rademacher")
PUSH = 1e-6  # small enough that nothing overflows however often it is added

Work = Callable[[], object]


def noise_rows(asked: BenchOptions, *, say: Callable[[str], None]) -> Iterator[Row]:
    """Yields, by dtype: a memory pass, the fresh-tensor scheme's pass, and our kernels under both laws.

    `step_` adds c z in place, `lanes_` writes theta + c z and theta - c z, `visit_` does both in one pass. The ratio to
    two plain forwards is that of a pass over all parameters of the model; they read 64 tokens unless asked otherwise.
    """
    for dtype in asked.dtypes_or("float32", "bfloat16"):
        frame = Frame("noise", dtype, asked.tokens_or(TOKENS)[0])
        say(f"noise: {dtype}")
        yield from _case(open_model(asked, dtype).model, asked, frame=frame)


def _case(model: nn.Module, asked: BenchOptions, *, frame: Frame) -> Iterator[Row]:
    dim = sum(parameter.numel() for parameter in model.parameters())
    entries = min(ENTRIES, dim)
    target = torch.randn(entries, device=asked.device).mul_(0.02).to(torch_dtype(frame.dtype))
    fresh = nn.Parameter(target.clone(), requires_grad=False)
    works: dict[str, Work] = {
        "base": partial(forwards, model, [batch_of(frame.tokens, model)] * 2),
        MEMORY_PASS: partial(target.mul_, 1.0),
        "fresh Gaussian tensors": partial(perturb_, {"theta": fresh}, 1, sign=1.0, mu=PUSH),
        **_kernels(target),
    }
    samples = interleaved(works, repeats=asked.repeats, device=asked.device)
    each = {name: 1e9 * median(times) / entries for name, times in samples.items() if name != "base"}
    base = 1e9 * median(samples["base"]) / dim
    frame = frame.against(base=base, inplace=each["fresh Gaussian tensors"])
    yield from (frame.row(name, value, unit="ns") for name, value in each.items())


def _kernels(target: Tensor) -> dict[str, Work]:
    """Returns our kernels by name, each with both laws."""
    ops, plus, minus = backend_of(target), torch.empty_like(target), torch.empty_like(target)
    works: dict[str, Work] = {}
    for law in LAWS:
        key = {"tensor": 1, "seed": 2, "law": law}
        works[f"step_, {law}"] = partial(ops.step_, target, coefficient=PUSH, **key)
        works[f"lanes_, {law}"] = partial(ops.lanes_, plus, minus, target, offset=PUSH, **key)
        works[f"visit_, one step, {law}"] = partial(
            ops.visit_, plus, minus, target, steps=[(3, PUSH)], offset=PUSH, **key
        )
    return works


def backend_of(tensor: Tensor) -> ModuleType:
    """Returns the kernels that `zo.perturb` takes for a tensor: numba, Triton, or plain torch."""
    name, needs = ("numba_ops", "numba") if tensor.device.type == "cpu" else ("triton_ops", "triton")
    plain = os.environ.get("FEDMEZO_NOISE", "") == "torch" or not util.find_spec(needs)
    return import_module(f"fedmezo.zo.kernels.{'torch_ops' if plain else name}")
