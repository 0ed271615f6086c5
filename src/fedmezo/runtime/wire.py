"""Wire format v4: the bytes of a Task, of a Reply, and of what brings a client's model up to date.

Everything is little-endian, nothing is aligned, every length is explicit. A message is

    offset  0   magic     4 bytes  "FMZO"
            4   version   u8       4
            5   kind      u8       1 = task, 2 = reply
            6   body
          end   crc32     u32      of all bytes before it (zlib's polynomial); catches every single flipped bit

    task body   settings  (`news.py`) what all tasks of a round share
                walker    (`news.py`) client, rate and clip
                told u8   0: count u32, then as many news (`news.py`), oldest first
                          1: sums (`scalars.py`) of the pool of this task, named by the seed of this task
                          2: tensors (`binary.py`), the change of every trained parameter
                          3: tensors with types told, every trained parameter itself
    reply body  round u32, client u32, examples u32, loss f64,
                coding u8 (0 float32, 1 float16, 2 bfloat16, 3 float8, 4 sign), slopes (`scalars.py`),
                dense u8 (0, 1); when 1: tensors

Neither seeds nor places in a pool travel: they follow from the task. Decoding arbitrary bytes raises `WireError` or
returns a valid message. Every count is compared with its limit, and with the bytes that are there, before anything of
its size is made; a pool has at most 2**20 seeds.

Messages of versions 2 and 3 are read too: journals are full of them. Those of 3 know no shared directions; those of 2
also have other news, and tell nothing of kind 3.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from fedmezo.errors import WireError
from fedmezo.fl.algorithm import MAX_SLOPES, Reply, Task
from fedmezo.runtime.binary import COUNT, WIRE_VERSION, Reader, limit, pack_tensors, read_tensors, seal, speaking
from fedmezo.runtime.news import (
    MAX_NEWS,
    NEWS_BYTES,
    OLD_NEWS_BYTES,
    News,
    pack_news,
    pack_task,
    read_news,
    read_old_news,
    read_task,
)
from fedmezo.runtime.scalars import Sums, pack_slopes, pack_sums, read_slopes, read_sums
from fedmezo.zo.coding import CODINGS
from fedmezo.zo.seedsum import DenseDelta

__all__ = [
    "WIRE_VERSION",
    "News",
    "Sums",
    "Told",
    "Values",
    "decode_reply",
    "decode_task",
    "encode_reply",
    "encode_task",
    "pack_told",
]

_TASK, _REPLY = 1, 2
_NEWS, _SUMS, _TENSORS, _VALUES = 0, 1, 2, 3
_REPLY_BODY = struct.Struct("<IIId")


@dataclass(frozen=True)
class Values:
    """Every trained parameter itself: name -> float32, float16 or bfloat16 tensor.

    A base plus its change, in floating point, does not give the same bits; and these take 2 bytes in 16 bits.
    """

    tensors: Mapping[str, Tensor]


Told: TypeAlias = tuple[News, ...] | Sums | DenseDelta | Values


def encode_task(task: Task, news: Sequence[News] | Sums | DenseDelta | Values | bytes = ()) -> bytes:
    """Returns the bytes of a task and of what brings its client up to date; 96 bytes without that and without odds.

    Odds add 2 bytes per seed of the pool. Each news adds 33 bytes, its odds, its coded slopes without their counts, and
    of each walk its client: 1 byte where the gap to the one before is below 128, never more than 4 on average. That is
    when all walks share rate, clip, weight and count of slopes; where they do not, each further walk adds 8, 8, 4 and 4
    bytes. Settings other than the task's, in more than round and odds, add 57 bytes.
    Float32 sums add at most 2 bytes and 4 per seed of the pool, 16-bit ones at most 4 bytes and 2 per seed.
    Changes add 4 bytes per scalar, and per tensor 3, its name and 8 per dimension. Values add 4 or 2 bytes per scalar,
    and 1 more per tensor.

    Args:
      task: the task.
      news: what brings its client up to date; or the bytes of that, as `pack_told` gives them for any task of a round.

    Raises:
      WireError: a number is not what its coding can write, there is too much of something, or the sums are not of the
        task's pool and seed.
    """
    return seal(_TASK, [*pack_task(task), news if isinstance(news, bytes) else pack_told(task, news)])


def pack_told(task: Task, told: Sequence[News] | Sums | DenseDelta | Values) -> bytes:
    """Returns the bytes of what brings a client up to date: the same for all tasks of a round.

    Raises:
      WireError: as `encode_task`.
    """
    return b"".join(_pack_told(task, told))


def _pack_told(task: Task, told: Sequence[News] | Sums | DenseDelta | Values) -> list[bytes]:
    if isinstance(told, Values):
        return [bytes([_VALUES]), *pack_tensors(told.tensors, typed=True)]
    if isinstance(told, DenseDelta):
        return [bytes([_TENSORS]), *pack_tensors(told.tensors)]
    if isinstance(told, Sums):
        if (told.seed, told.pool) != (task.seed, task.pool):
            got = f"seed {told.seed} and pool {told.pool} with seed {task.seed} and pool {task.pool}"
            raise WireError(f"Sums must be of the task's own pool, got {got}; send those of its run.")
        return [bytes([_SUMS]), *pack_sums(told)]
    limit("news", len(told), MAX_NEWS)
    return [bytes([_NEWS]), COUNT.pack(len(told)), *(part for item in told for part in pack_news(item, task=task))]


def decode_task(data: bytes, *, shapes: Mapping[str, tuple[int, ...]] | None = None) -> tuple[Task, Told]:
    """Returns the task, and the news, sums, changes or values, that `encode_task` was given.

    Args:
      data: the bytes.
      shapes: name -> shape every tensor must have, and no others; None accepts any.

    Raises:
      WireError: the bytes are not a valid task, or its tensors are not those of `shapes`.
    """
    with speaking("task"):
        reader = Reader(data, _TASK)
        task = read_task(reader)
        told = _told(reader, task, shapes)
        reader.end()
        return task, told


def _told(reader: Reader, task: Task, shapes: Mapping[str, tuple[int, ...]] | None) -> Told:
    old = reader.version == 2
    kind = reader.byte("kind of content", below=_VALUES if old else _VALUES + 1)
    if kind == _VALUES:
        return Values(read_tensors(reader, shapes, typed=True))
    if kind == _TENSORS:
        return DenseDelta(read_tensors(reader, shapes))
    if kind == _SUMS:
        return read_sums(reader, seed=task.seed, pool=task.pool)
    count = reader.count("news", most=MAX_NEWS, bits=8 * (OLD_NEWS_BYTES if old else NEWS_BYTES))
    return tuple(read_old_news(reader) if old else read_news(reader, task) for _ in range(count))


def encode_reply(reply: Reply) -> bytes:
    """Returns the bytes of a reply: 36 bytes plus its coded slopes, and its tensors if it carries any.

    Raises:
      WireError: a slope is not what the reply's coding can write, or a tensor cannot be written.
    """
    loss = math.nan if math.isnan(reply.loss) else reply.loss
    head = _REPLY_BODY.pack(reply.round, reply.client, reply.examples, loss)
    parts = [head, bytes([CODINGS.index(reply.coding)]), *pack_slopes(reply.slopes, reply.coding)]
    if reply.delta is None:
        return seal(_REPLY, [*parts, b"\0"])
    return seal(_REPLY, [*parts, b"\1", *pack_tensors(reply.delta.tensors)])


def decode_reply(data: bytes, *, shapes: Mapping[str, tuple[int, ...]] | None = None, most: int = MAX_SLOPES) -> Reply:
    """Returns the reply that `encode_reply` was given.

    Args:
      data: the bytes.
      shapes: name -> shape every tensor must have, and no others; None accepts any.
      most: slopes it may have; a sign takes one bit of the bytes and 64 of memory.

    Raises:
      WireError: the bytes are not a valid reply, or its tensors are not those of `shapes`, or its slopes are too many.
    """
    with speaking("reply"):
        reader = Reader(data, _REPLY)
        number, client, examples, loss = reader.take(_REPLY_BODY)
        coding = CODINGS[reader.byte("coding", below=len(CODINGS))]
        slopes = read_slopes(reader, coding, most=most)
        delta = DenseDelta(read_tensors(reader, shapes)) if reader.byte("dense flag", below=2) else None
        reader.end()
        return Reply(number, client, examples, loss, slopes, delta, coding)
