"""The noise contract for CUDA tensors, in Triton: the same functions as `torch_ops`, same bits, one pass over memory.

A coefficient times an entry of z is exact in float32, and in float64 for walks; a weight times a walk is not, so the
kernels are compiled without fused multiply-add. With TRITON_INTERPRET=1 set before this module is imported, they run
on CPU tensors, slowly.
"""

# Triton reads a kernel's annotations as its own types, and its decorator has none.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,import-untyped,import-not-found"
# ruff: noqa: ANN001, ANN202

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from fedmezo.zo.kernels.triton_tile import CHUNKS, direction, load, normal, place, settled, store
from fedmezo.zo.noise import GAUSSIAN_DOMAIN, RADEMACHER_DOMAIN, Law, table

_SPAN = 2048  # entries of one program's tile
_OPTIONS = {"enable_fp_fusion": False}

# What changes from call to call must not make Triton compile again when it happens to be 1 or a multiple of 16.
_ANY = ["tensor", "first", "count"]


@triton.jit(do_not_specialize=_ANY)
def _visit(
    target, plus, minus, half_table, seeds, coefficients, count, tensor, first, skip, size,
    domain: tl.constexpr, steps: tl.constexpr, lanes: tl.constexpr,
):  # fmt: skip
    """Lets `target` take `count` steps, then writes its lanes; the last seed and coefficient are the lanes' own."""
    at, exists = place(skip, size)
    x = load(target, at, exists)
    if steps:
        for k in range(count):
            seed = tl.load(seeds + k)
            x += tl.load(coefficients + k) * direction(seed, tensor, first, half_table, domain)
            x = settled(x, seed, tensor, first, target.dtype.element_ty)
        store(target, at, exists, x)
    if lanes > 0:
        z = tl.load(coefficients + count) * direction(tl.load(seeds + count), tensor, first, half_table, domain)
        store(plus, at, exists, x + z)
        if lanes > 1:
            store(minus, at, exists, x - z)


@triton.jit(do_not_specialize=[*_ANY, "walks"])
def _walks(
    target, half_table, seeds, coefficients, ends, weights, walks, tensor, first, skip, size, domain: tl.constexpr
):  # fmt: skip
    """Adds weighted walks; walk w has the seeds [ends[w], ends[w + 1]), and after the last one comes the rounding's."""
    at, exists = place(skip, size)
    total = tl.zeros((CHUNKS, 8, 64), tl.float64)
    for w in range(walks):
        walk = tl.zeros((CHUNKS, 8, 64), tl.float64)
        for k in range(tl.load(ends + w), tl.load(ends + w + 1)):
            z = direction(tl.load(seeds + k), tensor, first, half_table, domain)
            walk += tl.load(coefficients + k) * z.to(tl.float64)
        total += tl.load(weights + w) * walk.to(tl.float32).to(tl.float64)
    x = (load(target, at, exists).to(tl.float64) + total).to(tl.float32)
    seed = tl.load(seeds + tl.load(ends + walks))
    store(target, at, exists, settled(x, seed, tensor, first, target.dtype.element_ty))


@triton.jit(do_not_specialize=["tensor", "first"])
def _settle(target, source, seeds, tensor, first, skip, size):
    """Writes `source`, rounded stochastically."""
    at, exists = place(skip, size)
    x = settled(load(source, at, exists), tl.load(seeds), tensor, first, target.dtype.element_ty)
    store(target, at, exists, x)


@triton.jit
def _look_up(out, half_table):
    index = tl.program_id(0) * 2048 + tl.arange(0, 2048)
    tl.store(out + index, normal(index.to(tl.uint32), half_table))


@cache
def _half_table(device: torch.device) -> Tensor:
    return torch.from_numpy(table()[32768:].copy()).to(device)


@lru_cache(maxsize=64)
def _sent(data: bytes, dtype: np.dtype[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, dtype).copy()).to(device)


def _on_device(values: Sequence[float], dtype: type[np.generic], device: torch.device) -> Tensor:
    """Returns numbers on the device, seeds as int64; cached, since all tensors of a model take the same steps."""
    array = np.array(values, dtype)
    return _sent(array.tobytes(), np.dtype(np.int64) if dtype is np.uint64 else array.dtype, device)


def _launch(kernel: Any, target: Tensor, *args: Any, tensor: int, start: int = 0, **constants: Any) -> None:
    """Runs a kernel over the 2048-entry blocks of the parameter that hold entries [start, start + target's size)."""
    first, skip = divmod(start, _SPAN)
    signed = tensor - (1 << 32) if tensor >> 31 else tensor  # an id of one machine type compiles once
    key = {"tensor": signed, "first": first, "skip": skip, "size": target.numel()}
    with torch.cuda.device_of(target):
        grid = (triton.cdiv(skip + target.numel(), _SPAN),)
        kernel[grid](target, *args, **key, **constants, **_OPTIONS)


def _domain(law: Law) -> int:
    return GAUSSIAN_DOMAIN if law == "gaussian" else RADEMACHER_DOMAIN


def _visit_(
    target: Tensor, lanes: Sequence[Tensor], keys: Sequence[tuple[int, float]], law: Law, tensor: int, start: int
) -> None:
    """Launches a visit; `keys` are the (seed, coefficient) of each step, then of the lanes if there are any."""
    seeds = _on_device([seed for seed, _ in keys], np.uint64, target.device)
    coefficients = _on_device([coefficient for _, coefficient in keys], np.float32, target.device)
    count, (plus, minus) = len(keys) - bool(lanes), [*lanes, target, target][:2]
    args = (plus, minus, _half_table(target.device), seeds, coefficients, count)
    constants = {"domain": _domain(law), "steps": count > 0, "lanes": len(lanes)}
    _launch(_visit, target, *args, tensor=tensor, start=start, **constants)


def lookup(device: torch.device | str = "cuda") -> NDArray[np.float32]:
    """Returns the value this backend gives each of the 65,536 Gaussian inputs, float32 of shape (65536,)."""
    out = torch.empty(65536, device=device)
    with torch.cuda.device_of(out):
        _look_up[(32,)](out, _half_table(out.device), **_OPTIONS)
    values: NDArray[np.float32] = out.cpu().numpy()
    return values


def entries(
    seed: int, tensor: int, *, size: int, law: Law, start: int = 0, device: torch.device | str = "cuda"
) -> Tensor:
    """Returns entries [start, start + size) of z(seed) for tensor id `tensor`, float32 on `device`."""
    out = torch.zeros(size, device=device)
    step_(out, tensor=tensor, seed=seed, coefficient=1.0, law=law, start=start)
    return out


def step_(target: Tensor, *, tensor: int, seed: int, coefficient: float, law: Law, start: int = 0) -> None:
    """Adds coefficient * z(seed)[start:] to `target` in place: one float32 rounding, then one to a half `target`."""
    _visit_(target, (), [(seed, coefficient)], law, tensor, start)


def lane_(out: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0) -> None:
    """Writes source + offset * z(seed)[start:] to `out`."""
    _visit_(source, (out,), [(seed, offset)], law, tensor, start)


def lanes_(
    plus: Tensor, minus: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0
) -> None:
    """Writes source + offset * z(seed)[start:] to `plus` and source - offset * z(seed)[start:] to `minus`."""
    _visit_(source, (plus, minus), [(seed, offset)], law, tensor, start)


def visit_(
    plus: Tensor,
    minus: Tensor,
    target: Tensor,
    *,
    tensor: int,
    steps: Sequence[tuple[int, float]],
    seed: int,
    offset: float,
    law: Law,
    start: int = 0,
) -> None:
    """Lets `target` take `steps`, pairs (seed, coefficient), in order, then writes the lanes `plus` and `minus`."""
    _visit_(target, (plus, minus), [*steps, (seed, offset)], law, tensor, start)


def walks_(
    target: Tensor,
    *,
    tensor: int,
    seeds: Sequence[Sequence[int]],
    coefficients: Sequence[Sequence[float]],
    weights: Sequence[float],
    law: Law,
    rounding: int = 0,
) -> None:
    """Adds the weighted sum of walks to `target`: walks sum in float64, round to float32, then average in float64.

    The new `target` rounds to float32 once; a half `target` then takes it with the rounding bits of seed `rounding`.
    """
    device = target.device
    keys = _on_device([*chain.from_iterable(seeds), rounding], np.uint64, device)
    each = _on_device(list(chain.from_iterable(coefficients)), np.float64, device)
    ends = _on_device(list(accumulate(map(len, seeds), initial=0)), np.int64, device)
    args = (_half_table(device), keys, each, ends, _on_device(weights, np.float64, device), len(weights))
    _launch(_walks, target, *args, tensor=tensor, domain=_domain(law))


def stochastic_(target: Tensor, source: Tensor, *, tensor: int, seed: int, start: int = 0) -> None:
    """Writes the float32 `source` to `target`, a half rounded with the rounding bits [start:] of `seed`."""
    _launch(_settle, target, source, _on_device([seed], np.uint64, target.device), tensor=tensor, start=start)
