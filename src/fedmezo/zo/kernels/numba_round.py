"""Reading and rounding of float32, bfloat16 and float16 in compiled code, entry by entry.

Halves travel as their 16 bits: uint16 arrays hold bfloat16, int16 arrays hold float16. numba has no float16 on the
CPU, but LLVM has. Loops over these functions compile to vector instructions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic, overload

__all__ = ["load", "nearest", "step", "stochastic"]

_U16, _U32, _F32 = np.uint16, np.uint32, np.float32
_HALF, _FLOAT, _SHORT, _WORD = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)


def _conversion(code: Callable[[ir.IRBuilder, ir.Value], ir.Value], source: Any, result: Any) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def convert(typingctx, value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        return result(source), lambda context, builder, signature, args: code(builder, args[0])

    return convert


_bits = _conversion(lambda b, x: b.bitcast(x, _WORD), types.float32, types.uint32)
_float = _conversion(lambda b, x: b.bitcast(x, _FLOAT), types.uint32, types.float32)
_from_float16 = _conversion(lambda b, x: b.fpext(b.bitcast(x, _HALF), _FLOAT), types.int16, types.float32)
_to_float16 = _conversion(lambda b, x: b.bitcast(b.fptrunc(x, _HALF), _SHORT), types.float32, types.int16)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _nearest_bfloat16(value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    raw = _bits(value)
    return _U16(_U32(raw + _U32(0x7FFF) + ((raw >> _U32(16)) & _U32(1))) >> _U32(16))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _step_bfloat16(value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return _U16(_U32(_bits(value) + _U32(bits)) >> _U32(16))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _stochastic_bfloat16(value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    raw = _bits(value)
    quiet = _U32(0x400000) if value != value else _U32(0)
    return _U16(_U32(_U32(raw + (_U32(bits) if abs(value) < _F32(np.inf) else _U32(0))) | quiet) >> _U32(16))


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _stochastic_float16(value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    raw, size, cut = _bits(value), abs(value), _U32(_U32(bits) >> _U32(3))
    normal = _float(_U32(_U32(raw + cut) & _U32(0xFFFFE000)))
    # Below 2**-14 the grid is 2**-24; a count of grid points below 1025 loses nothing as an integer.
    count = np.int32(min(_F32(size * _F32(2.0**24)), _F32(2048)) + _F32(cut) * _F32(2.0**-13))
    tiny = _float(_U32(_bits(_F32(_F32(count) * _F32(2.0**-24))) | (raw & _U32(0x80000000))))
    small = normal if size >= _F32(2.0**-14) else tiny
    return _to_float16(small if size < _F32(65504) else value)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _as_it_is(value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return value


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _without_bits(value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return value


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _from_bfloat16(value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    return _float(_U32(_U32(value) << _U32(16)))


_READ = {types.float32: _as_it_is, types.uint16: _from_bfloat16, types.int16: _from_float16}
_NEAREST = {types.float32: _as_it_is, types.uint16: _nearest_bfloat16, types.int16: _to_float16}
_STEP = {types.float32: _without_bits, types.uint16: _step_bfloat16, types.int16: _stochastic_float16}
_STOCHASTIC = {types.float32: _without_bits, types.uint16: _stochastic_bfloat16, types.int16: _stochastic_float16}


def load(array: Any, at: Any) -> Any:
    """Returns entry `at` of a float32, bfloat16 or float16 array as float32; in compiled code only."""
    raise NotImplementedError


def nearest(array: Any, at: Any, value: Any) -> Any:
    """Writes a float32 to entry `at` of such an array, rounded to nearest even; in compiled code only.

    The value must be a sum with an entry of such an array: then a nan, whose low bits are zero, needs no care.
    """
    raise NotImplementedError


def stochastic(array: Any, at: Any, value: Any, bits: Any) -> Any:
    """Writes a float32 to entry `at` of such an array, a half rounded by 16 random bits; in compiled code only."""
    raise NotImplementedError


def step(array: Any, at: Any, value: Any, bits: Any) -> Any:
    """Does what `stochastic` does, for a sum with an entry of such an array; in compiled code only."""
    raise NotImplementedError


@overload(load)  # type: ignore[untyped-decorator]
def _load(array, at):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    read = _READ[array.dtype]
    return lambda array, at: read(array[at])


@overload(nearest)  # type: ignore[untyped-decorator]
def _nearest(array, at, value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    rounded = _NEAREST[array.dtype]

    def write(array, at, value):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        array[at] = rounded(value)

    return write


@overload(stochastic)  # type: ignore[untyped-decorator]
def _stochastic(array, at, value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    rounded = _STOCHASTIC[array.dtype]

    def write(array, at, value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        array[at] = rounded(value, bits)

    return write


@overload(step)  # type: ignore[untyped-decorator]
def _step(array, at, value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    rounded = _STEP[array.dtype]

    def write(array, at, value, bits):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        array[at] = rounded(value, bits)

    return write
