"""Directions and rounding bits compiled for the CPU, a chunk of 2048 entries at a time.

The generator is written in LLVM's vector instructions, which every target has: left to itself the compiler vectorises
such loops in one place and not in the next, and the step then takes twice as long. Looking entries up in the table is
bound by the loads of single numbers, Philox by vector arithmetic; each block of 64 look-ups therefore runs between the
rounds of Philox that make the next block, which hides one behind the other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic

from fedmezo.zo.noise import GAUSSIAN_DOMAIN, RADEMACHER_DOMAIN, ROUNDING_DOMAIN

__all__ = ["CHUNK", "fetch", "fill", "fill_bits", "fill_both", "scratch"]

CHUNK = 2048  # four Gaussian chunks, one Rademacher chunk
_U64 = np.uint64
_GAUSSIAN, _RADEMACHER, _ROUNDING = _U64(GAUSSIAN_DOMAIN), _U64(RADEMACHER_DOMAIN), _U64(ROUNDING_DOMAIN)
_LANES = 8  # counters made while a block of 8 * 8 entries is looked up
_I8, _I16, _I32, _I64 = (ir.IntType(width) for width in (8, 16, 32, 64))


def _number(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _spread(b: ir.IRBuilder, value: ir.Value, lanes: int) -> ir.Value:
    """Returns a vector with `value` in every lane."""
    nothing = ir.Constant(ir.VectorType(_I64, lanes), ir.Undefined)
    one = b.insert_element(nothing, value, ir.Constant(_I32, 0))
    return b.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _philox(
    b: ir.IRBuilder, counter: list[ir.Value], seed: ir.Value, *, lanes: int, between: Callable[[int], None]
) -> list[ir.Value]:
    """Returns the four words of Philox4x32-10 for counters (block + lane, 0, tensor, domain), in 64-bit lanes.

    The upper half of a lane is rubbish: only the multiplications care, and these mask it.

    Args:
      b: where to write code.
      counter: block, tensor, domain.
      seed: the key.
      lanes: how many counters.
      between: writes what else to do after each round, given its number.
    """
    each = [_spread(b, value, lanes) for value in counter]
    count, zero, mask, half, low_factor, high_factor = (
        ir.Constant(each[0].type, list(values))
        for values in (range(lanes), *([n] * lanes for n in (0, 0xFFFFFFFF, 32, 0xD2511F53, 0xCD9E8D57)))
    )
    words = [b.add(each[0], count), zero, each[1], each[2]]
    keys = [seed, b.lshr(seed, _number(32))]
    for turn in range(10):
        low, high = b.mul(b.and_(words[0], mask), low_factor), b.mul(b.and_(words[2], mask), high_factor)
        first = b.xor(b.xor(b.lshr(high, half), words[1]), _spread(b, keys[0], lanes))
        third = b.xor(b.xor(b.lshr(low, half), words[3]), _spread(b, keys[1], lanes))
        words = [first, high, third, low]
        keys = [b.add(keys[0], _number(0x9E3779B9)), b.add(keys[1], _number(0xBB67AE85))]
        between(turn)
    return words


def _place(context: Any, b: ir.IRBuilder, array_type: Any, array: ir.Value, at: ir.Value) -> ir.Value:
    """Returns the address of entry `at` of an array of 16-bit numbers."""
    data = context.make_array(array_type)(context, b, array).data
    return b.gep(b.bitcast(data, _I16.as_pointer()), [at])


def _write(b: ir.IRBuilder, words: list[ir.Value], place: ir.Value, word_stride: int, half_stride: int) -> None:
    lanes = words[0].type.count
    sixteen, narrow = ir.Constant(words[0].type, [16] * lanes), ir.VectorType(_I16, lanes)
    for word, value in enumerate(words):
        for half in range(2):
            bits = b.trunc(b.lshr(value, sixteen) if half else value, narrow)
            to = b.gep(place, [_number(word * word_stride + half * half_stride)])
            b.store(bits, b.bitcast(to, narrow.as_pointer())).align = 2


def _look_up(b: ir.IRBuilder, z: ir.Value, halves: ir.Value, values: ir.Value, entries: list[int]) -> None:
    for entry in entries:
        index = b.zext(b.load(b.gep(halves, [_number(entry)])), _I64)
        b.store(b.load(b.gep(values, [index])), b.gep(z, [_number(entry)]))


_ENTRIES = [64 * half + lane for half in range(8) for lane in range(_LANES)]


def _writer(lanes: int, word_stride: int, half_stride: int) -> Any:
    @intrinsic  # type: ignore[untyped-decorator]
    def halves_at(typingctx, out, at, block, tensor, domain, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        def code(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            words = _philox(b, args[2:5], args[5], lanes=lanes, between=lambda _: None)
            _write(b, words, _place(context, b, signature.args[0], args[0], args[1]), word_stride, half_stride)
            return context.get_dummy_value()

        return types.void(out, types.int64, *[types.uint64] * 4), code

    return halves_at


_first_halves, _halves, _rademacher_halves = _writer(_LANES, 128, 64), _writer(32, 128, 64), _writer(16, 16, 64)


def _piped(domains: list[int]) -> Any:
    """Returns a function that makes a block of halves of each domain between the look-ups of the block before."""

    @intrinsic  # type: ignore[untyped-decorator]
    def next_and_look_up(typingctx, z, halves, bits, values, at, before, block, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        def code(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
            def place(which: int, at: ir.Value) -> ir.Value:
                return _place(context, b, signature.args[which], args[which], at)

            to, old, table = place(0, args[5]), place(1, args[5]), place(3, _number(0))
            turns = 10 * len(domains)
            cuts = [len(_ENTRIES) * turn // turns for turn in range(turns + 1)]
            for which, domain in enumerate(domains):

                def between(turn: int, done: int = 10 * which) -> None:
                    _look_up(b, to, old, table, _ENTRIES[cuts[done + turn] : cuts[done + turn + 1]])

                counter = [args[6], args[7], _number(domain)]
                words = _philox(b, counter, args[8], lanes=_LANES, between=between)
                _write(b, words, place(1 + which, args[4]), 128, 64)
            return context.get_dummy_value()

        return types.void(z, halves, bits, values, *[types.int64] * 2, *[types.uint64] * 3), code

    return next_and_look_up


_next_and_look_up, _next_bits_and_look_up = _piped([GAUSSIAN_DOMAIN]), _piped([GAUSSIAN_DOMAIN, ROUNDING_DOMAIN])


@intrinsic  # type: ignore[untyped-decorator]
def _look_up_at(typingctx, z, halves, values, at):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    def code(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        to, old, table = (
            _place(context, b, signature.args[k], args[k], at) for k, at in enumerate((args[3], args[3], _number(0)))
        )
        _look_up(b, to, old, table, _ENTRIES)
        return context.get_dummy_value()

    return types.void(z, halves, values, types.int64), code


@intrinsic  # type: ignore[untyped-decorator]
def _fetch(typingctx, array, at):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    def code(context, b, signature, args):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        data = b.bitcast(context.make_array(signature.args[0])(context, b, args[0]).data, _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [data.type, _I32, _I32, _I32])
        prefetch = b.module.declare_intrinsic("llvm.prefetch", [data.type], kind)
        to_write, near, of_data = (ir.Constant(_I32, flag) for flag in (1, 3, 1))
        b.call(prefetch, [b.gep(data, [args[1]]), to_write, near, of_data])
        return context.get_dummy_value()

    return types.void(array, types.int64), code


@njit(nogil=True)  # type: ignore[untyped-decorator]
def fetch(array, chunk):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Asks for a chunk of an array, if it has that many, to be brought near, ready to be written.

    Without this a kernel waits for memory, since the processor foresees no reading while it makes noise.
    """
    if chunk * CHUNK < array.size:
        size = CHUNK * array.itemsize
        for line in range(0, size, 64):
            _fetch(array, chunk * size + line)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _fill_gaussian(z, halves, values, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    block, before = _U64(chunk) * _U64(256), 0
    _first_halves(halves, 0, block, tensor, _GAUSSIAN, seed)
    for lane in range(_LANES, 256, _LANES):
        at = 512 * (lane // 64) + lane % 64
        _next_and_look_up(z, halves, halves, values, at, before, block + _U64(lane), tensor, seed)
        before = at
    _look_up_at(z, halves, values, before)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _fill_gaussian_and_bits(z, halves, bits, values, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    block, before = _U64(chunk) * _U64(256), 0
    _first_halves(halves, 0, block, tensor, _GAUSSIAN, seed)
    _first_halves(bits, 0, block, tensor, _ROUNDING, seed)
    for lane in range(_LANES, 256, _LANES):
        at = 512 * (lane // 64) + lane % 64
        _next_bits_and_look_up(z, halves, bits, values, at, before, block + _U64(lane), tensor, seed)
        before = at
    _look_up_at(z, halves, values, before)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def _fill_rademacher(z, halves, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    _rademacher_halves(halves, 0, _U64(chunk) * _U64(16), tensor, _RADEMACHER, seed)
    for half in range(2):
        for bit in range(16):
            for word in range(64):
                sign = (halves[64 * half + word] >> np.uint16(bit)) & np.uint16(1)
                z[1024 * half + 64 * bit + word] = np.int16(1) - np.int16(2) * np.int16(sign)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def scratch():  # type: ignore[no-untyped-def]  # noqa: ANN201
    """Returns the arrays `z`, `halves` and `bits` for `fill_both`, one after the other.

    The processor takes addresses 4096 bytes apart for one at first; arrays that lie anywhere may cost it a tenth.
    """
    whole = np.empty(3 * CHUNK, np.uint16)
    return whole[:CHUNK].view(np.int16), whole[CHUNK : 2 * CHUNK], whole[2 * CHUNK :]


@njit(nogil=True)  # type: ignore[untyped-decorator]
def fill(z, halves, values, gaussian, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Writes chunk number `chunk` of z(seed) to the int16 array `z`: 1024 times an entry, or a sign.

    Args:
      z: int16, a chunk.
      halves: scratch, uint16, a chunk.
      values: the table, int16.
      gaussian: which law.
      chunk: number of the chunk in the parameter.
      tensor: the parameter's id.
      seed: the direction's name.
    """
    if gaussian:
        _fill_gaussian(z, halves, values, chunk, tensor, seed)
    else:
        _fill_rademacher(z, halves, chunk, tensor, seed)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def fill_bits(halves, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Writes chunk number `chunk` of the rounding bits of `seed` to the uint16 array `halves`."""
    for lane in range(0, 256, 32):
        at = 512 * (lane // 64) + lane % 64
        _halves(halves, at, _U64(chunk) * _U64(256) + _U64(lane), tensor, _ROUNDING, seed)


@njit(nogil=True)  # type: ignore[untyped-decorator]
def fill_both(z, halves, bits, values, gaussian, chunk, tensor, seed):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """Does what `fill` does for `z` and `fill_bits` for `bits`, faster."""
    if gaussian:
        _fill_gaussian_and_bits(z, halves, bits, values, chunk, tensor, seed)
    else:
        _fill_rademacher(z, halves, chunk, tensor, seed)
        fill_bits(bits, chunk, tensor, seed)
