"""The noise contract on one tile of a Triton program: from a seed to entries of z, and from float32 to 16 bits.

A tile [chunk, halfword, lane] is four chunks of 512 entries: one Philox call fills the eight halfwords of its lane,
and memory is read and written in runs of 64 entries. The 64 kB of the table's upper half fit a first-level cache.
Nothing here relies on how a device rounds to bfloat16 or whether it fuses multiply and add.
"""

# Triton reads a kernel's annotations as its own types, and its decorator has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped,import-not-found"
# ruff: noqa: ANN001, ANN201, ANN202

import triton
import triton.language as tl

from fedmezo.zo.noise import RADEMACHER_DOMAIN, ROUNDING_DOMAIN

CHUNKS = tl.constexpr(4)  # 2048 entries: one Rademacher chunk
_RADEMACHER, _ROUNDING = tl.constexpr(RADEMACHER_DOMAIN), tl.constexpr(ROUNDING_DOMAIN)


@triton.jit
def place(skip, size):
    """The tile's places in the tensor, int64, and which of them exist; `skip` entries of the first tile do not."""
    chunk = tl.program_id(0).to(tl.int64) * CHUNKS + tl.arange(0, CHUNKS)
    row, lane = tl.arange(0, 8), tl.arange(0, 64)
    at = chunk[:, None, None] * 512 + (row[None, :, None] * 64 + lane[None, None, :] - skip)
    return at, (at >= 0) & (at < size)


@triton.jit
def _halves(w0, w1, w2, w3):
    """Four words per [chunk, lane] as a tile of halfwords; halfword 2k is the low half of word k."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (CHUNKS, 64, 8))
    return tl.permute(halves, (0, 2, 1))


@triton.jit
def _pair(bits, which: tl.constexpr):
    """Bits `which` and `which` + 1 as the two halves of a word."""
    return ((bits >> which) & 1) | (((bits >> which) & 2) << 15)


@triton.jit
def _bits(seed, tensor, first, domain: tl.constexpr):
    """The random bits of the tile: 16 per entry, or one under the Rademacher law."""
    chunk = ((first + tl.program_id(0)) * CHUNKS + tl.arange(0, CHUNKS)).to(tl.uint32)[:, None]
    lane = tl.arange(0, 64).to(tl.uint32)[None, :]
    if domain == _RADEMACHER:
        # A lane owns one word per four chunks and reads 8 bits of it in each: one call makes 8 entries here too.
        w0, w1, w2, w3 = tl.philox(seed, (chunk >> 2) * 16 + (lane & 15), 0, tensor, domain, 10)
        word = tl.where(lane < 32, tl.where(lane < 16, w0, w1), tl.where(lane < 48, w2, w3))
        byte = word >> ((chunk & 3) * 8)
        return _halves(_pair(byte, 0), _pair(byte, 2), _pair(byte, 4), _pair(byte, 6))
    else:
        w0, w1, w2, w3 = tl.philox(seed, chunk * 64 + lane, 0, tensor, domain, 10)
        return _halves(w0, w1, w2, w3)


@triton.jit
def normal(index, half_table):
    """The table at a 16-bit index, float32; its lower half is the upper one, mirrored and negated."""
    mirror = (index >> 15) - 1  # all ones in the lower half, else zero
    sign = 1 - 2 * (mirror & 1).to(tl.int32)
    value = tl.load(half_table + ((index ^ mirror) & 0x7FFF).to(tl.int32)).to(tl.int32)
    return (sign * value).to(tl.float32) * 0.0009765625


@triton.jit
def direction(seed, tensor, first, half_table, domain: tl.constexpr):
    """The tile's entries of z(seed), float32."""
    bits = _bits(seed, tensor, first, domain)
    if domain == _RADEMACHER:
        return 1.0 - 2.0 * bits.to(tl.float32)
    else:
        return normal(bits, half_table)


@triton.jit
def _bfloat16(x, carry):
    """Float32 `x` cut to its upper half after adding `carry` to the lower one, kept in float32; a nan turns quiet."""
    bits = x.to(tl.uint32, bitcast=True)
    bits += tl.where(x == x, carry, (bits & 0x00400000) ^ 0x00400000)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _float16(x, carry):
    """Float32 `x` up or down to a float16 value as its cut off bits and `carry` (13 bits) say, kept in float32."""
    size = tl.abs(x)
    bits = x.to(tl.uint32, bitcast=True)
    normal = (bits + tl.where(size < 65504.0, carry, 0)) & 0xFFFFE000
    steps = tl.floor(size * 16777216.0 + carry.to(tl.float32) * 0.0001220703125)
    tiny = (steps * 5.9604644775390625e-08).to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    rounded = tl.where(size >= 0.00006103515625, normal, tiny).to(tl.float32, bitcast=True)
    return tl.where(size < 65504.0, rounded, x.to(tl.float16).to(tl.float32))


@triton.jit
def settled(x, seed, tensor, first, dtype: tl.constexpr):
    """Float32 `x` rounded stochastically to `dtype` with the rounding bits of `seed`, kept in float32."""
    if dtype == tl.float32:
        return x
    elif dtype == tl.bfloat16:
        return _bfloat16(x, _bits(seed, tensor, first, _ROUNDING))
    else:
        return _float16(x, _bits(seed, tensor, first, _ROUNDING) >> 3)


@triton.jit
def load(source, at, exists):
    """The tile of `source`, float32."""
    x = tl.load(source + at, mask=exists)
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def store(target, at, exists, x):
    """Writes float32 `x`, rounded to nearest even."""
    if target.dtype.element_ty == tl.bfloat16:
        even = (x.to(tl.uint32, bitcast=True) >> 16) & 1
        bits = _bfloat16(x, even + 0x7FFF).to(tl.uint32, bitcast=True)
        tl.store(target + at, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=exists)
    else:
        tl.store(target + at, x.to(target.dtype.element_ty), mask=exists)
