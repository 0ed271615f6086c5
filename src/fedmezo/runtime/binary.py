"""The frame around every message, named tensors, and reading that never goes beyond the end; bytes as in `wire.py`.

number    of variable length: 7 bits in each byte, the lowest first; the highest bit is set in all bytes but the last,
          which is 0 only when it is the first. Below 2**35, so at most 5 bytes
tensors   count u32, then as many in name order: length u16, name in UTF-8; rank u8, as many sizes u64;
          type u8 (0 float32, 1 float16, 2 bfloat16) where types are told, and float32 where not; values, row-major
"""

import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmezo.errors import RunError, WireError

__all__ = [
    "COUNT",
    "WIRE_VERSION",
    "Reader",
    "limit",
    "pack_numbers",
    "pack_tensors",
    "read_tensors",
    "seal",
    "speaking",
]

WIRE_VERSION = 4
OLDEST_VERSION = 2  # of the messages that are still read
MAX_BYTES = 1 << 34
MAX_TENSORS = 1 << 16
MAX_NAME = 1 << 10
MAX_RANK = 8
COUNT = struct.Struct("<I")

_MAGIC = b"FMZO"
_HEAD = struct.Struct("<4sBB")
_NUMBER_BYTES = 5
_TYPES = (torch.float32, torch.float16, torch.bfloat16)
# The bits of a number are copied, and so is a nan.
_WORDS = {
    torch.float32: (torch.int32, "<i4"),
    torch.float16: (torch.int16, "<i2"),
    torch.bfloat16: (torch.int16, "<i2"),
}


def limit(what: str, got: int, most: int) -> None:
    """Does nothing when `got` is at most `most`; raises WireError otherwise."""
    if got > most:
        raise WireError(f"Too many {what}: at most {most}, got {got}.")


def seal(kind: int, parts: Sequence[bytes]) -> bytes:
    """Returns a message: the head, the parts and their checksum."""
    body = _HEAD.pack(_MAGIC, WIRE_VERSION, kind) + b"".join(parts)
    limit("bytes in a message", len(body) + COUNT.size, MAX_BYTES)
    return body + COUNT.pack(zlib.crc32(body))


@contextmanager
def speaking(what: str) -> Iterator[None]:
    """Turns every complaint about a message's content into one `WireError`."""
    try:
        yield
    except (WireError, RunError, ValueError, OverflowError) as error:
        raise WireError(f"Not a valid {what}: {str(error).rstrip('.')}; have the sender send it again.") from error


class Reader:
    """The body of one message, read from front to back and never beyond its end.

    Attributes:
      version: of the wire format it is written in.
    """

    def __init__(self, data: bytes, kind: int) -> None:
        """Checks the frame; raises WireError."""
        limit("bytes in a message", len(data), MAX_BYTES)
        if len(data) < _HEAD.size + COUNT.size:
            raise WireError(f"it has {len(data)} bytes, which is less than a header")
        magic, version, got = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise WireError(f"it begins with {magic!r} instead of {_MAGIC!r}")
        if not OLDEST_VERSION <= version <= WIRE_VERSION:
            expected = f"{OLDEST_VERSION} to {WIRE_VERSION}"
            raise WireError(f"wire format {version}, expected {expected}: both sides need the same fedmezo")
        if COUNT.unpack_from(data, len(data) - COUNT.size)[0] != zlib.crc32(memoryview(data)[: -COUNT.size]):
            raise WireError("its checksum is wrong")
        if got != kind:
            raise WireError(f"it is of kind {got}, expected {kind}")
        self.version = int(version)
        self._data, self._at, self._stop = data, _HEAD.size, len(data) - COUNT.size

    def _advance(self, size: int) -> int:
        if size > self._stop - self._at:
            raise WireError(f"{size} bytes expected at offset {self._at}, {self._stop - self._at} are there")
        self._at += size
        return self._at - size

    def take(self, form: struct.Struct) -> tuple[Any, ...]:
        """Returns the next values."""
        return form.unpack_from(self._data, self._advance(form.size))

    def byte(self, what: str, *, below: int) -> int:
        """Returns the next byte, which must be less than `below`."""
        number = self._data[self._advance(1)]
        if number >= below:
            raise WireError(f"unknown {what} {number}")
        return number

    def count(self, what: str, *, most: int, bits: int) -> int:
        """Returns a count, known to be within its limit and within the bytes left at `bits` bits or more each."""
        number = int(self.take(COUNT)[0])
        self.room(what, number, most=most, bits=bits)
        return number

    def room(self, what: str, number: int, *, most: int, bits: int) -> None:
        """Raises WireError when `number` is above its limit, or the bytes left hold fewer at `bits` bits each."""
        limit(what, min(most + 1, number), most)
        limit(f"{what} for the bytes there", number, (self._stop - self._at) * 8 // bits)

    def array(self, form: str, number: int) -> NDArray[Any]:
        """Returns a read-only view of the next `number` values of numpy type `form`."""
        begin = self._advance(np.dtype(form).itemsize * number)
        return np.frombuffer(self._data, form, number, begin)

    def numbers(self, what: str, count: int) -> NDArray[np.int64]:
        """Returns the next `count` numbers of variable length, at least one, as `pack_numbers` wrote them."""
        size = min(self._stop - self._at, _NUMBER_BYTES * count)
        there = np.frombuffer(self._data, "<u1", size, self._at)
        ends = np.flatnonzero(there < 128)[:count]
        sizes = np.diff(ends, prepend=-1)
        if len(ends) < count or sizes.max() > _NUMBER_BYTES or (there[ends[sizes > 1]] == 0).any():
            raise WireError(f"its {what} are cut short or not written as numbers of variable length")
        begins, there = ends - sizes + 1, self.array("<u1", int(ends[-1]) + 1)
        places = np.arange(len(there)) - np.repeat(begins, sizes)
        return np.add.reduceat((there & 127).astype(np.int64) << 7 * places, begins)

    def end(self) -> None:
        """Raises WireError when anything is left."""
        if self._at != self._stop:
            raise WireError(f"{self._stop - self._at} bytes are left over")


def pack_numbers(numbers: Sequence[int]) -> bytes:
    """Returns the bytes of numbers of variable length, each in [0, 2**35)."""
    shifts = 7 * np.arange(_NUMBER_BYTES)
    groups = np.array(numbers, np.int64)[:, None] >> shifts
    there = (groups > 0) | (shifts == 0)
    more = np.pad(there[:, 1:], ((0, 0), (0, 1)))
    coded: NDArray[np.uint8] = (groups & 127 | more * 128)[there].astype(np.uint8)
    return coded.tobytes()


def pack_tensors(tensors: Mapping[str, Tensor], *, typed: bool = False) -> list[bytes]:
    """Returns the bytes of named tensors, in name order: float32 ones, or with `typed` 16-bit ones as well.

    Raises:
      WireError: a tensor is of another type or its name is not text, or there is too much of something.
    """
    limit("tensors", len(tensors), MAX_TENSORS)
    parts, types = [COUNT.pack(len(tensors))], _TYPES if typed else _TYPES[:1]
    for name in sorted(tensors):
        tensor, label = tensors[name], name.encode(errors="replace")
        limit("bytes in a tensor's name", len(label), MAX_NAME)
        limit("dimensions", tensor.dim(), MAX_RANK)
        if tensor.dtype not in types or label.decode() != name:
            good = " or ".join(str(one).removeprefix("torch.") for one in types)
            raise WireError(f"Tensor {name!r} must be {good} and its name text, got {tensor.dtype}; convert it first.")
        words, form = _WORDS[tensor.dtype]
        values = tensor.detach().cpu().contiguous().view(words).numpy().astype(form, copy=False)
        head = struct.pack(f"<H{len(label)}sB{tensor.dim()}Q", len(label), label, tensor.dim(), *tensor.shape)
        parts += [head, bytes([types.index(tensor.dtype)] * typed), values.tobytes()]
    return parts


def read_tensors(
    reader: Reader, shapes: Mapping[str, tuple[int, ...]] | None, *, typed: bool = False
) -> dict[str, Tensor]:
    """Returns what `pack_tensors` was given; every tensor owns its memory.

    Args:
      reader: where they come next.
      shapes: name -> shape every tensor must have, and no others; None accepts any.
      typed: whether types are told.
    """
    found: dict[str, Tensor] = {}
    for _ in range(reader.count("tensors", most=MAX_TENSORS, bits=24 + 8 * typed)):
        length = reader.take(struct.Struct("<H"))[0]
        limit("bytes in a tensor's name", length, MAX_NAME)
        name = reader.take(struct.Struct(f"<{length}s"))[0].decode()
        rank = reader.byte("number of dimensions", below=MAX_RANK + 1)
        shape = reader.take(struct.Struct(f"<{rank}Q"))
        if found and name <= next(reversed(found)):
            raise WireError(f"tensor '{name}' is out of order")
        if shapes is not None and shapes.get(name) != shape:
            raise WireError(f"tensor '{name}' has shape {shape}, expected {shapes.get(name)}")
        # An empty tensor passes the check against the bytes there, whatever its other sizes claim.
        limit("scalars in a tensor", math.prod(size for size in shape if size), MAX_BYTES)
        kind = _TYPES[reader.byte("type of tensor", below=len(_TYPES))] if typed else torch.float32
        words = reader.array(_WORDS[kind][1], math.prod(shape))
        found[name] = torch.from_numpy(words.astype(words.dtype.newbyteorder("="))).view(kind).reshape(shape)
    if shapes is not None and found.keys() != shapes.keys():
        raise WireError(f"{len(shapes)} tensors expected, got {len(found)}")
    return found
