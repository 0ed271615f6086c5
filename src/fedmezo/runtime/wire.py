"""Wire format v2: the bytes of a Task, of a Reply, and of what brings a client's model up to date.

Everything is little-endian, nothing is aligned, every length is explicit. A message is

    offset  0   magic     4 bytes  "FMZO"
            4   version   u8       2
            5   kind      u8       1 = task, 2 = reply
            6   body
          end   crc32     u32      of all bytes before it (zlib's polynomial); catches every single flipped bit

    task body   settings  what all tasks of a round share:
                          round u32, seed u64, mu f64, multiple f64, momentum f64, weight_decay f64,
                          steps u32, directions u32, pool u32,
                          law u8 (0 gaussian, 1 rademacher), estimator u8 (0 two-point, 1 forward, 2 forward-half),
                          coding u8 (0 float32, 1 float16, 2 bfloat16, 3 float8, 4 sign),
                          method u8 (0 walk, 1 sgd, 2 adamw),
                          flags u8 (sum of 1 dense, 2 importance, 4 normalise, 8 odds are there);
                          when odds are there: as many u16 as `pool` says
                walker    client u32, rate f64, clip f64
                told u8   0: count u32, then as many news
                          1: sums (`scalars.py`) of the pool of this task, named by the seed of this task
                          2: tensors, the change of every trained parameter
    news        settings  as above, once for all walks of that round
                count     u32, then as many walks: walker, weight f32, slopes
    reply body  round u32, client u32, examples u32, loss f64, coding u8 as above, slopes,
                dense u8 (0, 1); when 1: tensors
    slopes      count u32, then as many codes (`scalars.py`): float32 4 bytes, float16 and bfloat16 2, float8 1,
                sign 1 bit
    tensors     count u32, then as many in name order: length u16, name in UTF-8; rank u8, as many sizes u64;
                values f32, row-major

Neither seeds nor places in a pool travel: they follow from the task. Decoding arbitrary bytes raises `WireError` or
returns a valid message. Every count is compared with its limit, and with the bytes that are there, before anything of
its size is made; a pool has at most 2**20 seeds.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fedmezo.errors import RunError, WireError
from fedmezo.fl.algorithm import METHODS, Reply, Task
from fedmezo.runtime.binary import COUNT, WIRE_VERSION, Reader, limit, pack_tensors, read_tensors, seal, speaking
from fedmezo.runtime.scalars import (
    LARGEST,
    MAX_POOL,
    Sums,
    pack_slopes,
    pack_sums,
    read_odds,
    read_slopes,
    read_sums,
)
from fedmezo.zo.coding import CODINGS
from fedmezo.zo.estimate import Estimator
from fedmezo.zo.noise import Law
from fedmezo.zo.seedsum import DenseDelta

__all__ = ["WIRE_VERSION", "News", "Sums", "decode_reply", "decode_task", "encode_reply", "encode_task"]

MAX_NEWS = 1 << 20
MAX_WALKS = 1 << 20

_TASK, _REPLY = 1, 2
_NEWS, _SUMS, _TENSORS = 0, 1, 2
_LAWS: tuple[Law, ...] = ("gaussian", "rademacher")
_ESTIMATORS: tuple[Estimator, ...] = ("two-point", "forward", "forward-half")
_SETTINGS = struct.Struct("<IQddddIII")
_WALKER = struct.Struct("<Idd")
_WEIGHT = struct.Struct("<f")
_REPLY_BODY = struct.Struct("<IIId")


def _settings(task: Task) -> bytes:
    """Returns what all walks of one round share, except the odds themselves."""
    scales = (task.mu, task.multiple, task.momentum, task.weight_decay)
    numbers = _SETTINGS.pack(task.round, task.seed, *scales, task.steps, task.directions, task.pool)
    names = (_LAWS.index(task.law), _ESTIMATORS.index(task.estimator), CODINGS.index(task.coding))
    flags = task.dense | task.importance << 1 | task.normalise << 2 | bool(task.odds) << 3
    return numbers + bytes([*names, METHODS.index(task.method), flags])


@dataclass(frozen=True, slots=True)
class News:
    """What the model gained in one earlier round, for a client that still has an older model.

    Attributes:
      tasks: one per walk, in client order; equal except for client, rate and clip.
      slopes: one tuple per walk.
      weights: one per walk; rounded to float32 here, as in `Update`.

    Raises:
      RunError: lengths differ, there is no walk, or the tasks are not of one round.
    """

    tasks: tuple[Task, ...]
    slopes: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks lengths and tasks and rounds the weights to float32."""
        if not self.tasks or not len(self.tasks) == len(self.slopes) == len(self.weights):
            lengths = (len(self.tasks), len(self.slopes), len(self.weights))
            raise RunError(f"News needs as many tasks, slopes and weights, at least one; got {lengths}.")
        odds = self.tasks[0].odds
        # The odds are long and nearly always one object.
        alike = all(task.odds is odds or task.odds == odds for task in self.tasks)
        if not alike or len({_settings(task) for task in self.tasks}) > 1:
            raise RunError("News: the tasks of one round may differ in client, rate and clip only.")
        if self.tasks[0].method != "walk":
            raise RunError("News can tell of walks only; after backpropagation send the parameters.")
        for task, slopes in zip(self.tasks, self.slopes, strict=True):
            if len(slopes) > task.steps * task.directions or any(map(math.isinf, slopes)):
                raise RunError(f"News: client {task.client} has too many slopes for its task, or infinite ones.")
        if not all(abs(weight) <= LARGEST for weight in self.weights):
            raise RunError(f"News.weights must be finite and fit float32, got {self.weights}.")
        object.__setattr__(self, "weights", tuple(float(np.float32(weight)) for weight in self.weights))


def encode_task(task: Task, news: Sequence[News] | Sums | DenseDelta = ()) -> bytes:
    """Returns the bytes of a task and of what brings its client up to date; 96 bytes without that and without odds.

    Odds add 2 bytes per seed of the pool. Each news adds 65 bytes and its odds, plus 28 per walk and its coded slopes.
    Float32 sums add at most 2 bytes and 4 per seed of the pool, 16-bit ones at most 4 bytes and 2 per seed.

    Raises:
      WireError: a number is not what its coding can write, there is too much of something, or the sums are not of the
        task's pool and seed.
    """
    parts = [*_pack_settings(task), _WALKER.pack(task.client, task.rate, task.clip)]
    if isinstance(news, DenseDelta):
        return seal(_TASK, [*parts, bytes([_TENSORS]), *pack_tensors(news.tensors)])
    if isinstance(news, Sums):
        if (news.seed, news.pool) != (task.seed, task.pool):
            got = f"seed {news.seed} and pool {news.pool} with seed {task.seed} and pool {task.pool}"
            raise WireError(f"Sums must be of the task's own pool, got {got}; send those of its run.")
        return seal(_TASK, [*parts, bytes([_SUMS]), *pack_sums(news)])
    limit("news", len(news), MAX_NEWS)
    return seal(_TASK, [*parts, bytes([_NEWS]), COUNT.pack(len(news)), *(part for one in news for part in _pack(one))])


def _pack_settings(task: Task) -> list[bytes]:
    limit("seeds in a pool", task.pool, MAX_POOL)
    return [_settings(task), _odds(task.odds)]


@lru_cache(maxsize=4)
def _odds(odds: tuple[int, ...]) -> bytes:
    return np.array(odds, "<u2").tobytes()


def _pack(item: News) -> list[bytes]:
    limit("walks", len(item.tasks), MAX_WALKS)
    parts = [*_pack_settings(item.tasks[0]), COUNT.pack(len(item.tasks))]
    for task, slopes, weight in zip(item.tasks, item.slopes, item.weights, strict=True):
        parts += [_WALKER.pack(task.client, task.rate, task.clip), _WEIGHT.pack(weight)]
        parts += pack_slopes(slopes, task.coding)
    return parts


def decode_task(
    data: bytes, *, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> tuple[Task, tuple[News, ...] | Sums | DenseDelta]:
    """Returns the task, and the news, sums or tensors, that `encode_task` was given.

    Args:
      data: the bytes.
      shapes: name -> shape every tensor must have, and no others; None accepts any.

    Raises:
      WireError: the bytes are not a valid task, or its tensors are not those of `shapes`.
    """
    with speaking("task"):
        reader = Reader(data, _TASK)
        task = _walker(reader, _shared(reader))
        told = _told(reader, task, shapes)
        reader.end()
        return task, told


def _told(
    reader: Reader, task: Task, shapes: Mapping[str, tuple[int, ...]] | None
) -> tuple[News, ...] | Sums | DenseDelta:
    kind = reader.byte("kind of content", below=3)
    if kind == _TENSORS:
        return DenseDelta(read_tensors(reader, shapes))
    if kind == _SUMS:
        return read_sums(reader, seed=task.seed, pool=task.pool)
    return tuple(_news(reader) for _ in range(reader.count("news", most=MAX_NEWS, bits=8 * (_SETTINGS.size + 9))))


def _shared(reader: Reader) -> Task:
    """Returns the task of a round that is nobody's yet."""
    number, seed, mu, multiple, momentum, decay, steps, directions, pool = reader.take(_SETTINGS)
    law = _LAWS[reader.byte("law", below=len(_LAWS))]
    estimator = _ESTIMATORS[reader.byte("estimator", below=len(_ESTIMATORS))]
    coding = CODINGS[reader.byte("coding", below=len(CODINGS))]
    method = METHODS[reader.byte("method", below=len(METHODS))]
    flags = reader.byte("flags", below=16)
    limit("seeds in a pool", pool, MAX_POOL)
    return Task(
        number,
        0,
        seed,
        0.0,
        mu,
        steps,
        directions,
        multiple=multiple,
        law=law,
        estimator=estimator,
        dense=bool(flags & 1),
        pool=pool,
        odds=read_odds(reader, pool) if flags & 8 else (),
        importance=bool(flags & 2),
        coding=coding,
        normalise=bool(flags & 4),
        momentum=momentum,
        method=method,
        weight_decay=decay,
    )


def _walker(reader: Reader, shared: Task) -> Task:
    client, rate, clip = reader.take(_WALKER)
    task = replace(shared, client=client, rate=rate, clip=clip, odds=())
    # The odds were checked once for the round; a message could ask for that as often as it has walks.
    object.__setattr__(task, "odds", shared.odds)
    return task


def _news(reader: Reader) -> News:
    shared = _shared(reader)
    tasks, weights, slopes = [], [], []
    for _ in range(reader.count("walks", most=MAX_WALKS, bits=8 * (_WALKER.size + 8))):
        tasks.append(_walker(reader, shared))
        weights.append(reader.take(_WEIGHT)[0])
        slopes.append(read_slopes(reader, shared.coding))
    return News(tuple(tasks), tuple(slopes), tuple(weights))


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


def decode_reply(data: bytes, *, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Reply:
    """Returns the reply that `encode_reply` was given.

    Args:
      data: the bytes.
      shapes: name -> shape every tensor must have, and no others; None accepts any.

    Raises:
      WireError: the bytes are not a valid reply, or its tensors are not those of `shapes`.
    """
    with speaking("reply"):
        reader = Reader(data, _REPLY)
        number, client, examples, loss = reader.take(_REPLY_BODY)
        coding = CODINGS[reader.byte("coding", below=len(CODINGS))]
        slopes = read_slopes(reader, coding)
        delta = DenseDelta(read_tensors(reader, shapes)) if reader.byte("dense flag", below=2) else None
        reader.end()
        return Reply(number, client, examples, loss, slopes, delta, coding)
