"""The bytes of lists of numbers: coded slopes, the sums of a pool of seeds, and the odds of a draw.

Everything is little-endian. A code is one number in a format of `zo/coding.py`:

    float32   f32
    float16   f16 (IEEE 754 binary16)
    bfloat16  u16, the upper half of the f32
    float8    u8, the upper half of the f16 (e5m2)
    sign      no code: one bit each, see below

    codes     of slopes whose number is known; nan is a skipped slope and always the one with the sign bit clear and
              only the highest bit of the mantissa set (f32 00 00 c0 7f)
              in sign: one bit each, the first the lowest of the first byte, 1 for a slope above 0, padded to a byte;
              then the exceptions: count u32, as many u32 in increasing order: twice the place of a slope, plus 1 for
              nan, plus 0 for a slope of 0 (whose sign is lost)
    slopes    count u32, then as many codes
    sums      coding u8 (0 float32, 1 float16, 2 bfloat16)
              exponent i16, in float16 and bfloat16 only: codes are relative to 2**exponent, the smallest power of two
              above the largest |sum|, 2**0 when all are 0
              form u8: 0 dense, K codes; 1 sparse, K bits (1 for a sum that is not 0; order and padding as in sign),
              then the codes of those sums. The sender takes the smaller one; K is the task's pool
    odds      K u16, each at least 1
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmezo.errors import RunError, WireError
from fedmezo.fl.algorithm import MAX_SLOPES
from fedmezo.runtime.binary import COUNT, Reader
from fedmezo.zo.coding import SUMS_CODINGS, Coding, SumsCoding, coded_sums, sums_scale

__all__ = [
    "LARGEST",
    "MAX_CODES",
    "MAX_POOL",
    "SLOPE_BITS",
    "Sums",
    "listed",
    "pack_codes",
    "pack_slopes",
    "pack_sums",
    "read_codes",
    "read_odds",
    "read_slopes",
    "read_sums",
]

MAX_POOL = 1 << 20
MAX_CODES = 1 << 31  # twice a place must fit u32
SLOPE_BITS: dict[Coding, int] = {"float32": 32, "float16": 16, "bfloat16": 16, "float8": 8, "sign": 1}
LARGEST = float(np.finfo(np.float32).max)

_FORMS: dict[Coding, str] = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "float8": "<u1"}
_SIGNS = np.array([-1.0, 0.0, 1.0, math.nan], object)
_EXPONENT = struct.Struct("<h")
_EXPONENTS = range(-148, 129)  # of float32 values, denormal ones included


@dataclass(frozen=True, slots=True)
class Sums:
    """The model as a sum over a pool: base + sum_j values[j] * z(derive_seed("pool", seed, j)).

    Attributes:
      seed: the run's seed.
      pool: number K of candidate seeds, at most 2**20.
      coding: number format the sums travel in.
      values: K sums; rounded to `coding` here, so that both sides have the same numbers. Rounding is idempotent.

    Raises:
      RunError: there are not K finite sums that fit the format.
    """

    seed: int
    pool: int
    coding: SumsCoding
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks lengths and ranges and rounds the sums."""
        if not 0 <= self.seed < 2**64 or not 1 <= self.pool <= MAX_POOL or self.coding not in SUMS_CODINGS:
            got = f"seed {self.seed}, pool {self.pool}, coding {self.coding!r}"
            raise RunError(f"Sums need a seed in [0, 2**64), a pool in [1, {MAX_POOL}] and a known coding, got {got}.")
        if len(self.values) != self.pool:
            raise RunError(f"Sums.values must hold {self.pool} sums, got {len(self.values)}.")
        values = np.array(self.values, np.float64)
        self._check_size(values)
        with np.errstate(over="ignore"):
            values = coded_sums(values, self.coding).astype(np.float64)
        self._check_size(values)
        # Sparse bytes cannot tell -0 from 0.
        object.__setattr__(self, "values", tuple((values + 0.0).tolist()))

    def _check_size(self, values: NDArray[np.float64]) -> None:
        largest = float(np.max(np.abs(values)))
        if not largest <= LARGEST:
            raise RunError(f"Sums.values must be finite and fit {self.coding}, the largest is {largest}.")


def _codes(values: NDArray[np.float64], coding: Coding) -> NDArray[Any]:
    """Returns the codes of values that `coding` can write exactly; raises WireError for others."""
    with np.errstate(over="ignore", under="ignore"):
        if coding in ("float32", "bfloat16"):
            codes = values.astype("<f4")
            codes = codes if coding == "float32" else (codes.view("<u4") >> 16).astype("<u2")
        else:
            codes = values.astype("<f2")
            codes = codes if coding == "float16" else (codes.view("<u2") >> 8).astype("<u1")
    wrong = np.flatnonzero((_values(codes, coding) != values) & ~np.isnan(values))
    if wrong.size:
        raise WireError(f"Slopes and sums must be {coding} values, got {float(values[wrong[0]])!r}; round it first.")
    return codes


def _values(codes: NDArray[Any], coding: Coding) -> NDArray[np.float64]:
    """Returns the numbers that codes stand for."""
    if coding == "bfloat16":
        codes = (codes.astype("<u4") << 16).view("<f4")
    elif coding == "float8":
        codes = (codes.astype("<u2") << 8).view("<f2")
    # Foreign bytes may hold signalling nans; numpy warns wherever it meets one.
    with np.errstate(invalid="ignore"):
        values = codes.astype(np.float64)
        values[np.isnan(values)] = math.nan
    return values


def pack_slopes(slopes: Sequence[float], coding: Coding) -> list[bytes]:
    """Returns the bytes of at most 2**24 slopes.

    Raises:
      WireError: `coding` cannot write one exactly.
    """
    return [COUNT.pack(len(slopes)), *pack_codes(np.array(slopes, np.float64), coding)]


def pack_codes(slopes: NDArray[np.float64], coding: Coding) -> list[bytes]:
    """Returns the bytes of at most 2**31 slopes, without their number.

    Raises:
      WireError: `coding` cannot write one exactly.
    """
    values = np.where(np.isnan(slopes), math.nan, slopes)
    if coding != "sign":
        return [_codes(values, coding).tobytes()]
    wrong = np.flatnonzero((np.abs(values) != 1) & (values != 0) & ~np.isnan(values))
    if wrong.size:
        raise WireError(f"Slopes in sign must be -1, 0, 1 or nan, got {float(values[wrong[0]])!r}; round it first.")
    places = np.flatnonzero(np.abs(values) != 1)
    marks = (2 * places + np.isnan(values[places])).astype("<u4")
    return [np.packbits(values > 0, bitorder="little").tobytes(), COUNT.pack(len(places)), marks.tobytes()]


def read_slopes(reader: Reader, coding: Coding, *, most: int = MAX_SLOPES) -> tuple[float, ...]:
    """Returns what `pack_slopes` was given, if that is at most `most` slopes."""
    number = reader.count("slopes", most=most, bits=SLOPE_BITS[coding])
    return tuple(listed(read_codes(reader, coding, number), coding))


def listed(values: NDArray[np.float64], coding: Coding) -> list[float]:
    """Returns values that `coding` wrote, as a list; of signs, one bit each, all equal ones are one object."""
    told = values if coding != "sign" else _SIGNS[np.where(np.isnan(values), 3, values + 1).astype(np.int8)]
    found: list[float] = told.tolist()
    return found


def read_codes(reader: Reader, coding: Coding, number: int) -> NDArray[np.float64]:
    """Returns the `number` slopes that `pack_codes` was given."""
    if coding != "sign":
        return _values(reader.array(_FORMS[coding], number), coding)
    values = np.where(_bits(reader, number), 1.0, -1.0)
    marks = reader.array("<u4", reader.count("exceptions", most=number, bits=32)).astype(np.int64)
    places = marks >> 1
    if places.size and (places[-1] >= number or (np.diff(places) <= 0).any()):
        raise WireError("the exceptions among its slopes are out of order or range")
    values[places] = np.where(marks & 1, math.nan, 0.0)
    return values


def _bits(reader: Reader, number: int) -> NDArray[np.bool_]:
    packed = reader.array("<u1", (number + 7) // 8)
    return np.unpackbits(packed, count=number, bitorder="little").astype(np.bool_)


def pack_sums(sums: Sums) -> list[bytes]:
    """Returns the bytes of sums, dense or sparse, whichever are fewer; seed and pool are the task's."""
    values = np.array(sums.values, np.float64)
    parts = [bytes([SUMS_CODINGS.index(sums.coding)])]
    if sums.coding != "float32":
        exponent = _exponent(values)
        parts.append(_EXPONENT.pack(exponent))
        values = np.ldexp(values, -exponent)
    codes, there = _codes(values, sums.coding), values != 0
    bits = np.packbits(there, bitorder="little")
    if bits.nbytes + codes[there].nbytes < codes.nbytes:
        return [*parts, b"\1", bits.tobytes(), codes[there].tobytes()]
    return [*parts, b"\0", codes.tobytes()]


def read_sums(reader: Reader, *, seed: int, pool: int) -> Sums:
    """Returns what `pack_sums` was given, for the task's seed and pool."""
    coding = SUMS_CODINGS[reader.byte("coding of sums", below=len(SUMS_CODINGS))]
    exponent = 0 if coding == "float32" else int(reader.take(_EXPONENT)[0])
    if exponent not in _EXPONENTS:
        raise WireError(f"the exponent of its sums is {exponent}, expected {_EXPONENTS[0]} to {_EXPONENTS[-1]}")
    there = _bits(reader, pool) if reader.byte("form of sums", below=2) else np.ones(pool, np.bool_)
    codes = reader.array(_FORMS[coding], int(there.sum()))
    values = np.zeros(pool)
    values[there] = np.ldexp(_values(codes, coding), exponent)
    sums = Sums(seed, pool, coding, tuple(values.tolist()))
    if not np.array_equal(values, sums.values) or (coding != "float32" and exponent != _exponent(values)):
        raise WireError(f"its sums are not what {coding} writes relative to 2**{exponent}")
    return sums


def _exponent(values: NDArray[np.float64]) -> int:
    return math.frexp(sums_scale(values.astype(np.float32)))[1] - 1


def read_odds(reader: Reader, pool: int) -> tuple[int, ...]:
    """Returns the odds of a pool's seeds; their range is checked by `Task`."""
    return _whole(reader.array("<u2", pool).tobytes())


@lru_cache(maxsize=4)
def _whole(odds: bytes) -> tuple[int, ...]:
    # All tasks of a round have the same odds; as one object they take no memory per client.
    return tuple(np.frombuffer(odds, "<u2").tolist())
