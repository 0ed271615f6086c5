"""The noise contract compiled for the CPU: the same functions as `torch_ops`, same bits, one pass over memory."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from fedmezo.zo.noise import Law, table

_U16, _U32, _U64 = np.uint16, np.uint32, np.uint64
_CHUNK = 2048  # entries handled at a time: four Gaussian chunks, one Rademacher chunk; 8 kB, stays in the L1 cache
_PARALLEL = 1 << 20  # tensors with more entries are cut over the threads


@cache
def _values() -> NDArray[np.float32]:
    return table().astype(np.float32) / np.float32(1024)


@njit(inline="always")  # type: ignore[untyped-decorator]
def _philox(c0, c2, c3, k0, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    c1 = _U32(0)
    for _ in range(10):
        p0 = _U64(c0) * _U64(0xD2511F53)
        p1 = _U64(c2) * _U64(0xCD9E8D57)
        # Every result is cast back: numba promotes uint32 arithmetic to 64 bits silently.
        c0 = _U32(_U32(p1 >> _U64(32)) ^ c1 ^ k0)
        c1 = _U32(p1)
        c2 = _U32(_U32(p0 >> _U64(32)) ^ c3 ^ k1)
        c3 = _U32(p0)
        k0 = _U32(k0 + _U32(0x9E3779B9))
        k1 = _U32(k1 + _U32(0xBB67AE85))
    return c0, c1, c2, c3


@njit(inline="always")  # type: ignore[untyped-decorator]
def _fill_gaussian(z, index, values, chunk, tensor, k0, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for part in range(4):
        base = part * 512
        block = _U32(_U32(chunk) * _U32(256) + _U32(part * 64))
        for lane in range(64):
            w0, w1, w2, w3 = _philox(_U32(block + _U32(lane)), tensor, _U32(0), k0, k1)
            index[base + lane] = _U16(w0)
            index[base + 64 + lane] = _U16(w0 >> _U32(16))
            index[base + 128 + lane] = _U16(w1)
            index[base + 192 + lane] = _U16(w1 >> _U32(16))
            index[base + 256 + lane] = _U16(w2)
            index[base + 320 + lane] = _U16(w2 >> _U32(16))
            index[base + 384 + lane] = _U16(w3)
            index[base + 448 + lane] = _U16(w3 >> _U32(16))
    for entry in range(2048):
        z[entry] = values[index[entry]]


@njit(inline="always")  # type: ignore[untyped-decorator]
def _fill_rademacher(z, words, chunk, tensor, k0, k1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    for lane in range(16):
        w0, w1, w2, w3 = _philox(_U32(_U32(chunk) * _U32(16) + _U32(lane)), tensor, _U32(1), k0, k1)
        words[lane] = w0
        words[16 + lane] = w1
        words[32 + lane] = w2
        words[48 + lane] = w3
    for bit in range(32):
        for word in range(64):
            sign = (words[word] >> _U32(bit)) & _U32(1)
            z[64 * bit + word] = np.float32(1) - np.float32(2) * np.float32(sign)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _fill(z, scratch, values, gaussian, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    k0, k1 = _U32(seed), _U32(seed >> _U64(32))
    if gaussian:
        _fill_gaussian(z, scratch.view(_U16), values, chunk, _U32(tensor), k0, k1)
    else:
        _fill_rademacher(z, scratch, chunk, _U32(tensor), k0, k1)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _step(target, first, values, gaussian, tensor, seed, coefficient):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    z, scratch = np.empty(_CHUNK, np.float32), np.empty(_CHUNK // 2, _U32)
    for chunk in range((target.size + _CHUNK - 1) // _CHUNK):
        _fill(z, scratch, values, gaussian, first + chunk, tensor, seed)
        base = chunk * _CHUNK
        for entry in range(min(_CHUNK, target.size - base)):
            target[base + entry] += coefficient * z[entry]


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _lanes(plus, minus, source, first, values, gaussian, tensor, seed, offset):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    z, scratch = np.empty(_CHUNK, np.float32), np.empty(_CHUNK // 2, _U32)
    both = minus.size > 0
    for chunk in range((source.size + _CHUNK - 1) // _CHUNK):
        _fill(z, scratch, values, gaussian, first + chunk, tensor, seed)
        base = chunk * _CHUNK
        count = min(_CHUNK, source.size - base)
        for entry in range(count):
            plus[base + entry] = source[base + entry] + offset * z[entry]
        if both:
            for entry in range(count):
                minus[base + entry] = source[base + entry] - offset * z[entry]


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _lanes_within(plus, minus, source, begin, values, gaussian, tensor, seed, offset):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    # Entries of one chunk that do not start it. Kept apart: with a shift inside, the loops of _lanes take 2.5 times
    # as long.
    z, scratch = np.empty(_CHUNK, np.float32), np.empty(_CHUNK // 2, _U32)
    _fill(z, scratch, values, gaussian, begin // _CHUNK, tensor, seed)
    for entry in range(source.size):
        step = offset * z[begin % _CHUNK + entry]
        plus[entry] = source[entry] + step
        if minus.size > 0:
            minus[entry] = source[entry] - step


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _walks(target, first, values, gaussian, tensor, seeds, coefficients, ends, weights):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    z, scratch = np.empty(_CHUNK, np.float32), np.empty(_CHUNK // 2, _U32)
    walk, total = np.empty(_CHUNK, np.float64), np.empty(_CHUNK, np.float64)
    for chunk in range((target.size + _CHUNK - 1) // _CHUNK):
        base = chunk * _CHUNK
        count = min(_CHUNK, target.size - base)
        total[:] = 0.0
        begin = 0
        for which in range(ends.size):
            walk[:] = 0.0
            for step in range(begin, ends[which]):
                _fill(z, scratch, values, gaussian, first + chunk, tensor, seeds[step])
                coefficient = coefficients[step]
                for entry in range(_CHUNK):
                    walk[entry] += coefficient * np.float64(z[entry])
            begin = ends[which]
            weight = weights[which]
            for entry in range(_CHUNK):
                total[entry] += weight * np.float64(np.float32(walk[entry]))
        for entry in range(count):
            target[base + entry] = np.float32(np.float64(target[base + entry]) + total[entry])


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="fedmezo-noise")


def _over_threads(size: int, work: Callable[[int, slice], None]) -> None:
    """Calls work(first chunk, slice of entries) over chunk-aligned parts; they do not overlap, so order is free."""
    threads = torch.get_num_threads()
    if size <= _PARALLEL or threads == 1:
        work(0, slice(0, size))
        return
    chunks = (size + _CHUNK - 1) // _CHUNK
    cuts = [chunks * part // threads for part in range(threads + 1)]
    spans = [(a, slice(a * _CHUNK, min(b * _CHUNK, size))) for a, b in pairwise(cuts)]
    for done in [_pool(threads).submit(work, first, span) for first, span in spans]:
        done.result()


def _flat(tensor: Tensor) -> NDArray[np.float32]:
    array: NDArray[Any] = tensor.numpy()
    return array


def lookup() -> NDArray[np.float32]:
    """Returns the value this backend gives each of the 65,536 Gaussian inputs, float32 of shape (65536,)."""
    return _values()


def entries(seed: int, tensor: int, *, size: int, law: Law) -> Tensor:
    """Returns the first `size` entries of z(seed) for tensor id `tensor`, float32."""
    out = torch.zeros(size)
    step_(out, tensor=tensor, seed=seed, coefficient=1.0, law=law)
    return out


def step_(target: Tensor, *, tensor: int, seed: int, coefficient: float, law: Law) -> None:
    """Adds coefficient * z(seed) to the flat float32 `target` in place; one rounding per entry."""
    flat, values, gaussian = _flat(target), _values(), law == "gaussian"

    def work(first: int, span: slice) -> None:
        _step(flat[span], first, values, gaussian, _U32(tensor), _U64(seed), np.float32(coefficient))

    _over_threads(flat.size, work)


_NOTHING = np.empty(0, np.float32)


def lane_(out: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0) -> None:
    """Writes source + offset * z(seed)[start:] to `out`, both flat float32."""
    _write_lanes_(_flat(out), _NOTHING, _flat(source), start, (_U32(tensor), _U64(seed), np.float32(offset)), law)


def lanes_(
    plus: Tensor, minus: Tensor, source: Tensor, *, tensor: int, seed: int, offset: float, law: Law, start: int = 0
) -> None:
    """Writes source + offset * z(seed)[start:] to `plus` and the mirror image to `minus`; one generation of noise."""
    _write_lanes_(_flat(plus), _flat(minus), _flat(source), start, (_U32(tensor), _U64(seed), np.float32(offset)), law)


def _write_lanes_(
    plus: NDArray[np.float32],
    minus: NDArray[np.float32],
    source: NDArray[np.float32],
    start: int,
    key: tuple[np.uint32, np.uint64, np.float32],
    law: Law,
) -> None:
    values, gaussian = _values(), law == "gaussian"
    head = min(-start % _CHUNK, source.size)
    if head:
        _lanes_within(plus[:head], minus[:head], source[:head], start, values, gaussian, *key)
        plus, minus, source = plus[head:], minus[head:], source[head:]
    chunk = (start + head) // _CHUNK

    def work(first: int, span: slice) -> None:
        _lanes(plus[span], minus[span], source[span], chunk + first, values, gaussian, *key)

    _over_threads(source.size, work)


def walks_(
    target: Tensor,
    *,
    tensor: int,
    seeds: list[list[int]],
    coefficients: list[list[float]],
    weights: list[float],
    law: Law,
) -> None:
    """Adds the weighted sum of walks to `target`: walks sum in float64, round to float32, then average in float64."""
    flat, values, gaussian = _flat(target), _values(), law == "gaussian"
    all_seeds = np.array([seed for walk in seeds for seed in walk], _U64)
    all_coefficients = np.array([c for walk in coefficients for c in walk], np.float64)
    ends = np.cumsum(np.array([len(walk) for walk in seeds], np.int64))
    each = np.array(weights, np.float64)

    def work(first: int, span: slice) -> None:
        _walks(flat[span], first, values, gaussian, _U32(tensor), all_seeds, all_coefficients, ends, each)

    _over_threads(flat.size, work)
