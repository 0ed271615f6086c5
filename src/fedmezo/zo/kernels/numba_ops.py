"""The noise contract compiled for the CPU: the same functions as `torch_ops`, same bits, one pass over memory."""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from fedmezo.zo.kernels.numba_fill import CHUNK, fetch, fill, fill_bits, fill_both, scratch
from fedmezo.zo.kernels.numba_round import load, nearest, step, stochastic
from fedmezo.zo.noise import Law, table

_Array = NDArray[Any]
_F32, _F64, _U64 = np.float32, np.float64, np.uint64
_PARALLEL = 1 << 20  # tensors with more entries are cut over the threads


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _step(target, z, scale, coefficient, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for entry in range(target.size):
        step(target, entry, load(target, entry) + coefficient * (_F32(z[entry]) * scale), bits[entry])


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _lanes(plus, minus, source, z, scale, offset):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    if minus.size == 0:
        for entry in range(source.size):
            nearest(plus, entry, load(source, entry) + offset * (_F32(z[entry]) * scale))
    else:
        for entry in range(source.size):
            value, move = load(source, entry), offset * (_F32(z[entry]) * scale)
            nearest(plus, entry, value + move)
            nearest(minus, entry, value - move)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _visit(plus, minus, target, first, values, gaussian, tensor, seeds, coefficients, seed, offset):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    (z, halves, bits), scale = scratch(), _F32(2.0**-10 if gaussian else 1)
    for chunk in range((target.size + CHUNK - 1) // CHUNK):
        span = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, target.size))
        part = target[span]
        fetch(target, chunk + 1)
        for k in range(seeds.size):
            if target.itemsize < 4:
                fill_both(z, halves, bits, values, gaussian, first + chunk, tensor, seeds[k])
            else:
                fill(z, halves, values, gaussian, first + chunk, tensor, seeds[k])
            _step(part, z, scale, coefficients[k], bits)
        if plus.size > 0:
            fill(z, halves, values, gaussian, first + chunk, tensor, seed)
            _lanes(plus[span], minus[span], part, z, scale, offset)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _stochastic(target, source, first, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    bits = np.empty(CHUNK, np.uint16)
    for chunk in range((target.size + CHUNK - 1) // CHUNK):
        span = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, target.size))
        to, of = target[span], source[span]
        if target.itemsize < 4:
            fill_bits(bits, first + chunk, tensor, seed)
        for entry in range(to.size):
            stochastic(to, entry, of[entry], bits[entry])


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _walk(walk, z, halves, values, gaussian, chunk, tensor, seeds, coefficients):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    scale = 2.0**-10 if gaussian else 1.0
    walk[:] = 0.0
    for k in range(seeds.size):
        fill(z, halves, values, gaussian, chunk, tensor, seeds[k])
        coefficient = coefficients[k] * scale  # exact, and so is its product with an integer of 13 bits
        for entry in range(CHUNK):
            walk[entry] += coefficient * _F64(z[entry])


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _walks(target, first, values, gaussian, tensor, seeds, coefficients, ends, weights, rounding):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    z, halves, bits = scratch()
    walk, total = np.empty(CHUNK, _F64), np.empty(CHUNK, _F64)
    for chunk in range((target.size + CHUNK - 1) // CHUNK):
        part = target[chunk * CHUNK : min((chunk + 1) * CHUNK, target.size)]
        total[:] = 0.0
        for which in range(weights.size):
            taken = slice(ends[which], ends[which + 1])
            _walk(walk, z, halves, values, gaussian, first + chunk, tensor, seeds[taken], coefficients[taken])
            for entry in range(CHUNK):
                total[entry] += weights[which] * _F64(_F32(walk[entry]))
        if target.itemsize < 4:
            fill_bits(bits, first + chunk, tensor, rounding)
        for entry in range(part.size):
            stochastic(part, entry, _F32(_F64(load(part, entry)) + total[entry]), bits[entry])


def _keep_with_sources(*kernels: Any) -> None:
    """Makes numba compile kernels anew when any of their modules changes; by itself it looks at this one only."""
    sources = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("numba_*.py"))]
    digest = hashlib.sha256(b"".join(sources)).hexdigest()
    for kernel in kernels:
        with suppress(AttributeError):  # another numba may keep its stamps elsewhere
            kernel._cache._cache_file._source_stamp = (kernel._cache._cache_file._source_stamp, digest)


_keep_with_sources(_visit, _stochastic, _walks)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fedmezo-noise")


def _over_threads(size: int, work: Callable[[int, slice], None]) -> None:
    """Calls work(first chunk, slice of entries) over chunk-aligned parts; they do not overlap, so order is free."""
    threads = torch.get_num_threads()
    if size <= _PARALLEL or threads == 1:
        work(0, slice(0, size))
        return
    chunks = (size + CHUNK - 1) // CHUNK
    cuts = [chunks * part // threads for part in range(threads + 1)]
    spans = [(a, slice(a * CHUNK, min(b * CHUNK, size))) for a, b in pairwise(cuts)]
    for done in [_pool(threads).submit(work, first, span) for first, span in spans]:
        done.result()


def _in_chunks(arrays: Sequence[_Array], start: int, work: Callable[[int, Sequence[_Array]], None]) -> None:
    """Calls work(first chunk, parts of the arrays) such that parts begin where chunks do.

    Entries before the first whole chunk go through a padded copy: kernels that begin inside a chunk are slower.
    """
    size, shift = max(array.size for array in arrays), start % CHUNK
    head = min(CHUNK - shift, size) if shift else 0
    if head:
        padded = [np.zeros(min(array.size, 1) * (shift + head), array.dtype) for array in arrays]
        for pad, array in zip(padded, arrays, strict=True):
            pad[shift:] = array[:head]
        work(start // CHUNK, padded)
        for pad, array in zip(padded, arrays, strict=True):
            array[:head] = pad[shift:]
    chunk = (start + head) // CHUNK

    def part(first: int, span: slice) -> None:
        work(chunk + first, [array[head:][span] for array in arrays])

    if size > head:
        _over_threads(size - head, part)


_VIEWS = {torch.bfloat16: (torch.int16, np.uint16), torch.float16: (torch.int16, np.int16)}


def _flat(tensor: Tensor) -> _Array:
    if tensor.dtype in _VIEWS:
        same, view = _VIEWS[tensor.dtype]
        return tensor.view(same).numpy().view(view)
    array: _Array = tensor.numpy()
    return array


def lookup() -> NDArray[np.float32]:
    """Returns the value this backend gives each of the 65,536 Gaussian inputs, float32 of shape (65536,)."""
    return table().astype(np.float32) / np.float32(1024)


def entries(seed: int, tensor: int, *, size: int, law: Law) -> Tensor:
    """Returns the first `size` entries of z(seed) for tensor id `tensor`, float32."""
    out = torch.zeros(size)
    step_(out, tensor=tensor, seed=seed, coefficient=1.0, law=law)
    return out


def _visit_(
    plus: _Array, minus: _Array, target: _Array, steps: Sequence[tuple[int, float]], key: dict[str, Any]
) -> None:
    seeds = np.array([seed for seed, _ in steps], _U64)
    coefficients = np.array([coefficient for _, coefficient in steps], np.float32)
    tensor, law = _U64(key["tensor"]), key["law"] == "gaussian"
    seed, offset = _U64(key["seed"]), np.float32(key["offset"])

    def work(first: int, parts: Sequence[_Array]) -> None:
        _visit(parts[0], parts[1], parts[2], first, table(), law, tensor, seeds, coefficients, seed, offset)

    _in_chunks((plus, minus, target), key["start"], work)


def step_(target: Tensor, *, tensor: int, seed: int, coefficient: float, law: Law, start: int = 0) -> None:
    """Adds coefficient * z(seed)[start:] to `target` in place: one float32 rounding, then one to a half `target`."""
    flat = _flat(target)
    nothing = flat[:0]
    key = {"tensor": tensor, "seed": 0, "offset": 0.0, "law": law, "start": start}
    _visit_(nothing, nothing, flat, [(seed, coefficient)], key)


def lane_(out: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0) -> None:
    """Writes source + offset * z(seed)[start:] to `out`."""
    flat = _flat(source)
    key = {"tensor": tensor, "seed": seed, "offset": offset, "law": law, "start": start}
    _visit_(_flat(out), flat[:0], flat, [], key)


def lanes_(
    plus: Tensor, minus: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0
) -> None:
    """Writes source + offset * z(seed)[start:] to `plus` and the mirror image to `minus`; one generation of noise."""
    key = {"tensor": tensor, "seed": seed, "offset": offset, "law": law, "start": start}
    _visit_(_flat(plus), _flat(minus), _flat(source), [], key)


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
    """Lets `target` take `steps`, pairs (seed, coefficient), in order, then writes the lanes; one pass over memory."""
    key = {"tensor": tensor, "seed": seed, "offset": offset, "law": law, "start": start}
    _visit_(_flat(plus), _flat(minus), _flat(target), steps, key)


def stochastic_(target: Tensor, source: Tensor, *, tensor: int, seed: int, start: int = 0) -> None:
    """Writes the float32 `source` to `target`, a half rounded with the rounding bits [start:] of `seed`."""

    def work(first: int, parts: Sequence[_Array]) -> None:
        _stochastic(parts[0], parts[1], first, _U64(tensor), _U64(seed))

    _in_chunks((_flat(target), _flat(source)), start, work)


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
    all_seeds = np.array([seed for walk in seeds for seed in walk], _U64)
    all_coefficients = np.array([c for walk in coefficients for c in walk], np.float64)
    ends = np.cumsum(np.array([0, *(len(walk) for walk in seeds)], np.int64))
    walked = (_U64(tensor), all_seeds, all_coefficients, ends, np.array(weights, np.float64), _U64(rounding))

    def work(first: int, parts: Sequence[_Array]) -> None:
        _walks(parts[0], first, table(), law == "gaussian", *walked)

    _in_chunks((_flat(target),), 0, work)
