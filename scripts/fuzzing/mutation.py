"""Changing valid messages into almost valid ones, and putting their checksums right again."""

import gzip
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random

__all__ = ["Mend", "as_is", "edited", "gzipped", "headed", "sealed", "sealed_after"]

Mend = Callable[[bytes, Random], bytes]

_HEAD, _CHECKSUM = 6, 4
_VERSION, _VERSIONS = 4, (2, 3, 4)
_WIDTHS = "BHIQ"
_REALS = (0.0, -0.0, 1.0, -1.0, 5e-324, 1e308, 3.5e38, float("inf"), float("-inf"), float("nan"))
_TEXTS = (
    b"NaN", b"Infinity", b"1e999", b"-1", b"9" * 4400, b"0x" + b"f" * 5000, b"[" * 3000, b'{"a":' * 2000, b"\\ud800", b"\xff",
    b"\x00", b"\n", b"\r", b'"', b"'''", b"=", b",", b"2026-02-30", b"1979-05-27T07:32:00Z", b"null", b"true", b"{}", b"[]",
)  # fmt: skip


def as_is(data: bytes, rng: Random) -> bytes:
    """Returns the bytes: what has no checksum needs no mending."""
    return data


def sealed(data: bytes, rng: Random) -> bytes:
    """Returns a message with a right checksum, and mostly a right head; one in 32 stays broken."""
    if len(data) < _HEAD + _CHECKSUM or rng.random() < 1 / 32:
        return data
    version = data[_VERSION] if data[_VERSION] in _VERSIONS else rng.choice(_VERSIONS)
    kind = data[_HEAD - 1] if data[_HEAD - 1] in (1, 2) else 1 + (data[_HEAD - 1] & 1)
    body = b"FMZO" + bytes([version, kind]) + data[_HEAD:-_CHECKSUM]
    return body + struct.pack("<I", zlib.crc32(body))


def sealed_after(offsets: dict[int, int]) -> Mend:
    """Returns what mends the message inside a call: its kind -> where the message begins."""

    def mend(data: bytes, rng: Random) -> bytes:
        begin = offsets.get(data[0]) if data else None
        return data if begin is None else data[:begin] + sealed(data[begin:], rng)

    return mend


def gzipped(data: bytes, rng: Random) -> bytes:
    """Returns text packed; what looks packed already stays, and so does one in 16."""
    return data if data[:2] == b"\x1f\x8b" or rng.random() < 1 / 16 else gzip.compress(data, 1, mtime=0)


def headed(data: bytes, rng: Random) -> bytes:
    """Returns a safetensors file whose first number is the length of its header; one in 8 stays broken."""
    end = data.find(b"}}", 8) + 2
    if end < 10 or rng.random() < 1 / 8:
        return data
    end += len(data[end:]) - len(data[end:].lstrip(b" "))
    return struct.pack("<Q", end - 8) + data[8:]


def edited(data: bytes, rng: Random, *, others: Sequence[bytes], most: int) -> bytes:
    """Returns the bytes after one to six edits, at most `most` of them.

    Args:
      data: what is changed.
      rng: the source of chance.
      others: bytes of which parts are taken in.
      most: bytes of the result, at most.
    """
    room = bytearray(data)
    for _ in range(1 + int(rng.random() ** 2 * 6)):
        _EDITS[int(rng.random() * len(_EDITS))](room, rng, others)
    return bytes(room[:most])


def _place(room: bytearray, rng: Random) -> int:
    return int(rng.random() * (len(room) + 1))


def _flip_(room: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    if room:
        room[int(rng.random() * len(room))] ^= 1 << int(rng.random() * 8)


def _whole_(room: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    """Writes a number at the edge of something: powers of two, one less, one more, small ones."""
    form = rng.choice(_WIDTHS)
    size = struct.calcsize("<" + form)
    number = (1 << int(rng.random() * (8 * size + 1))) + rng.choice((-1, 0, 1))
    at = _place(room, rng)
    room[at : at + size] = struct.pack("<" + form, number % (1 << 8 * size))


def _real_(room: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    form, at = rng.choice("fd"), _place(room, rng)
    value = rng.choice(_REALS)
    if form == "f" and 3.4e38 < abs(value) < float("inf"):
        value = 3.4e38
    room[at : at + struct.calcsize(form)] = struct.pack("<" + form, value)


def _text_(room: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    at = _place(room, rng)
    room[at : at + int(rng.random() * 4)] = rng.choice(_TEXTS)


def _add_(room: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    at = _place(room, rng)
    room[at:at] = rng.randbytes(1 + int(rng.random() ** 3 * 32))


def _drop_(room: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    at = _place(room, rng)
    del room[at : at + 1 + int(rng.random() ** 3 * len(room))]


def _repeat_(room: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    at = _place(room, rng)
    part = bytes(room[at : at + 1 + int(rng.random() ** 3 * 64)])
    room[at:at] = part * (1 << int(rng.random() ** 3 * 8))


def _splice_(room: bytearray, rng: Random, others: Sequence[bytes]) -> None:
    other = rng.choice(others)
    begin, at = int(rng.random() * (len(other) + 1)), _place(room, rng)
    part = other[begin : begin + 1 + int(rng.random() ** 2 * 64)]
    room[at : at + len(part) * (rng.random() < 0.5)] = part


_EDITS = (_flip_, _flip_, _whole_, _whole_, _real_, _text_, _add_, _drop_, _repeat_, _splice_)
