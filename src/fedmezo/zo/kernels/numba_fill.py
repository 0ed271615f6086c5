"""What the compiled noise kernels are made of: random bits, directions and roundings, a chunk of 2048 at a time.

Halves travel as their 16 bits: uint16 arrays hold bfloat16, int16 arrays hold float16.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from fedmezo.zo.noise import GAUSSIAN_DOMAIN, RADEMACHER_DOMAIN, ROUNDING_DOMAIN

CHUNK = 2048  # four Gaussian chunks, one Rademacher chunk; 8 kB of float32, stays in the L1 cache
_U16, _U32, _U64 = np.uint16, np.uint32, np.uint64
_GAUSSIAN, _RADEMACHER, _ROUNDING = _U32(GAUSSIAN_DOMAIN), _U32(RADEMACHER_DOMAIN), _U32(ROUNDING_DOMAIN)


@njit  # type: ignore[untyped-decorator]
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


@njit  # type: ignore[untyped-decorator]
def _halfwords(out, chunk, tensor, domain, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    k0, k1 = _U32(seed), _U32(seed >> _U64(32))
    for part in range(4):
        base = part * 512
        block = _U32(_U32(chunk) * _U32(256) + _U32(part * 64))
        for lane in range(64):
            w0, w1, w2, w3 = _philox(_U32(block + _U32(lane)), _U32(tensor), domain, k0, k1)
            out[base + lane] = _U16(w0)
            out[base + 64 + lane] = _U16(w0 >> _U32(16))
            out[base + 128 + lane] = _U16(w1)
            out[base + 192 + lane] = _U16(w1 >> _U32(16))
            out[base + 256 + lane] = _U16(w2)
            out[base + 320 + lane] = _U16(w2 >> _U32(16))
            out[base + 384 + lane] = _U16(w3)
            out[base + 448 + lane] = _U16(w3 >> _U32(16))


@njit  # type: ignore[untyped-decorator]
def _fill_rademacher(z, words, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    k0, k1 = _U32(seed), _U32(seed >> _U64(32))
    for lane in range(16):
        w0, w1, w2, w3 = _philox(_U32(_U32(chunk) * _U32(16) + _U32(lane)), _U32(tensor), _RADEMACHER, k0, k1)
        words[lane] = w0
        words[16 + lane] = w1
        words[32 + lane] = w2
        words[48 + lane] = w3
    for bit in range(32):
        for word in range(64):
            sign = (words[word] >> _U32(bit)) & _U32(1)
            z[64 * bit + word] = np.float32(1) - np.float32(2) * np.float32(sign)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def fill(z, bits, values, gaussian, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Writes chunk number `chunk` of z(seed) to the float32 array `z`; `bits` is scratch, uint16 of a chunk."""
    if gaussian:
        _halfwords(bits, chunk, tensor, _GAUSSIAN, seed)
        for entry in range(CHUNK):
            z[entry] = values[bits[entry]]
    else:
        _fill_rademacher(z, bits.view(_U32), chunk, tensor, seed)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def fill_bits(bits, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Writes chunk number `chunk` of the rounding bits of `seed` to the uint16 array `bits`."""
    _halfwords(bits, chunk, tensor, _ROUNDING, seed)


def _code(build: Any, kind: Any, argument: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def convert(typingctx, value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return kind(argument), lambda context, builder, signature, args: build(builder, args[0])

    return convert


_HALF, _FLOAT, _SHORT, _WORD = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)
# numba has no float16 on the CPU, LLVM has.
_to_half = _code(lambda b, x: b.bitcast(b.fptrunc(x, _HALF), _SHORT), types.int16, types.float32)
_from_half = _code(lambda b, x: b.fpext(b.bitcast(x, _HALF), _FLOAT), types.float32, types.int16)
_raw = _code(lambda b, x: b.bitcast(x, _WORD), types.uint32, types.float32)
_value = _code(lambda b, x: b.bitcast(x, _FLOAT), types.float32, types.uint32)


def load(array: Any, at: Any) -> Any:
    """Returns entry `at` of a float32, bfloat16 or float16 array as float32; compiled code only."""
    raise NotImplementedError


def store(array: Any, at: Any, value: Any) -> Any:
    """Writes a float32 to entry `at` of such an array, rounded to nearest even; compiled code only."""
    raise NotImplementedError


def settle(array: Any, at: Any, value: Any, bits: Any) -> Any:
    """Writes a float32 to entry `at` of such an array, rounded stochastically by 16 random bits; compiled code only."""
    raise NotImplementedError


@overload(load)  # type: ignore[untyped-decorator]
def _load(array, at):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    if array.dtype == types.float32:
        return lambda array, at: array[at]
    if array.dtype == types.uint16:
        return lambda array, at: _value(_U32(_U32(array[at]) << _U32(16)))
    return lambda array, at: _from_half(array[at])


@njit  # type: ignore[untyped-decorator]
def _same(value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return value


@njit  # type: ignore[untyped-decorator]
def _first(value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return value


@njit  # type: ignore[untyped-decorator]
def _nearest_bfloat16(value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    raw = _raw(value)
    up = _U32(raw + _U32(0x7FFF) + ((raw >> _U32(16)) & _U32(1)))
    quiet = _U32(raw | _U32(0x400000))
    return _U16((up if value == value else quiet) >> _U32(16))


@njit  # type: ignore[untyped-decorator]
def _stochastic_bfloat16(value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    raw = _raw(value)
    kept = raw if value == value else _U32(raw | _U32(0x400000))
    return _U16((_U32(raw + _U32(bits)) if abs(value) < np.inf else kept) >> _U32(16))


@njit  # type: ignore[untyped-decorator]
def _stochastic_float16(value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    bits, size = _U32(bits) >> _U32(3), abs(value)
    normal = _value(_U32((_raw(value) + _U32(bits)) & _U32(0xFFFFE000)))
    whole = np.floor(np.float32(size * np.float32(2.0**24) + np.float32(bits) * np.float32(2.0**-13)))
    tiny = np.copysign(np.float32(whole * np.float32(2.0**-24)), value)
    small = normal if size >= np.float32(2.0**-14) else np.float32(tiny)
    return _to_half(small if size < np.float32(65504) else value)


@overload(store)  # type: ignore[untyped-decorator]
def _store(array, at, value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    nearest = {types.float32: _same, types.uint16: _nearest_bfloat16, types.int16: _to_half}[array.dtype]

    def write(array, at, value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        array[at] = nearest(value)

    return write


@overload(settle)  # type: ignore[untyped-decorator]
def _settle(array, at, value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    stochastic = {types.float32: _first, types.uint16: _stochastic_bfloat16, types.int16: _stochastic_float16}[
        array.dtype
    ]

    def write(array, at, value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        array[at] = stochastic(value, bits)

    return write
