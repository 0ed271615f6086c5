"""Wire format v1: the bytes of a Task, of a Reply, and of the news that brings an older model up to date.

Everything is little-endian, nothing is aligned, every length is explicit. A message is

    offset  0   magic     4 bytes  "FMZO"
            4   version   u8       1
            5   kind      u8       1 = task, 2 = reply
            6   body
          end   crc32     u32      of all bytes before it (zlib's polynomial); catches every single flipped bit

    task body   settings  round u32, seed u64, mu f64, multiple f64, steps u32, directions u32,
                          law u8 (0 gaussian, 1 rademacher), estimator u8 (0 two-point, 1 forward, 2 forward-half),
                          dense u8 (0, 1)
                walker    client u32, rate f64, clip f64
                count     u32, then as many news
    news        settings  as above, once for all walks of that round
                count     u32, then as many walks: walker, weight f32, count u32, as many slopes f32
    reply body  round u32, client u32, examples u32, loss f64, count u32, as many slopes f32,
                dense u8; when 1: count u32, then as many tensors in name order
    tensor      length u16, name in UTF-8; rank u8, as many sizes u64; values f32, row-major

A skipped slope is nan, always written 00 00 c0 7f. Decoding arbitrary bytes raises `WireError` or returns a valid
message. Every count is compared with its limit, and with the bytes that are there, before anything of its size is made.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmezo.errors import RunError, WireError
from fedmezo.fl.algorithm import MAX_SLOPES, Reply, Task
from fedmezo.zo.estimate import Estimator
from fedmezo.zo.noise import Law
from fedmezo.zo.seedsum import DenseDelta

__all__ = ["WIRE_VERSION", "News", "decode_reply", "decode_task", "encode_reply", "encode_task"]

WIRE_VERSION = 1
MAX_BYTES = 1 << 34
MAX_NEWS = 1 << 20
MAX_WALKS = 1 << 20
MAX_TENSORS = 1 << 16
MAX_NAME = 1 << 10
MAX_RANK = 8

_LARGEST = float(np.finfo(np.float32).max)
_MAGIC = b"FMZO"
_TASK, _REPLY = 1, 2
_LAWS: tuple[Law, ...] = ("gaussian", "rademacher")
_ESTIMATORS: tuple[Estimator, ...] = ("two-point", "forward", "forward-half")
_HEAD = struct.Struct("<4sBB")
_SETTINGS = struct.Struct("<IQddIIBBB")
_WALKER = struct.Struct("<Idd")
_REPLY_BODY = struct.Struct("<IIId")
_COUNT = struct.Struct("<I")


def _settings(task: Task) -> tuple[object, ...]:
    """Returns what all walks of one round share."""
    names = (_LAWS.index(task.law), _ESTIMATORS.index(task.estimator), int(task.dense))
    return (task.round, task.seed, task.mu, task.multiple, task.steps, task.directions, *names)


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
        if len({_settings(task) for task in self.tasks}) > 1:
            raise RunError("News: the tasks of one round may differ in client, rate and clip only.")
        for task, slopes in zip(self.tasks, self.slopes, strict=True):
            if len(slopes) > task.steps * task.directions or any(map(math.isinf, slopes)):
                raise RunError(f"News: client {task.client} has too many slopes for its task, or infinite ones.")
        if not all(abs(weight) <= _LARGEST for weight in self.weights):
            raise RunError(f"News.weights must be finite and fit float32, got {self.weights}.")
        object.__setattr__(self, "weights", tuple(float(np.float32(weight)) for weight in self.weights))


def encode_task(task: Task, news: Sequence[News] = ()) -> bytes:
    """Returns the bytes of a task and of the news its client needs; 73 bytes without news.

    Each news adds 43 bytes, plus 28 per walk and 4 per slope.

    Raises:
      WireError: a slope is not a float32 value, or there is too much news.
    """
    _limit("news", len(news), MAX_NEWS)
    parts = [_SETTINGS.pack(*_settings(task)), _WALKER.pack(task.client, task.rate, task.clip), _COUNT.pack(len(news))]
    for item in news:
        _limit("walks", len(item.tasks), MAX_WALKS)
        parts += [_SETTINGS.pack(*_settings(item.tasks[0])), _COUNT.pack(len(item.tasks))]
        for walked, slopes, weight in zip(item.tasks, item.slopes, item.weights, strict=True):
            parts += [_WALKER.pack(walked.client, walked.rate, walked.clip), struct.pack("<f", weight), _pack(slopes)]
    return _seal(_TASK, parts)


def decode_task(data: bytes) -> tuple[Task, tuple[News, ...]]:
    """Returns the task and the news that `encode_task` was given.

    Raises:
      WireError: the bytes are not a valid task.
    """
    with _speaking("task"):
        reader = _Reader(data, _TASK)
        settings = reader.take(_SETTINGS)
        task = _task(settings, reader.take(_WALKER))
        news = tuple(_news(reader) for _ in range(reader.count("news", limit=MAX_NEWS, size=_SETTINGS.size + 4)))
        reader.end()
        return task, news


def _task(settings: tuple[Any, ...], walker: tuple[Any, ...]) -> Task:
    number, seed, mu, multiple, steps, directions, law, estimator, dense = settings
    client, rate, clip = walker
    if law >= len(_LAWS) or estimator >= len(_ESTIMATORS) or dense > 1:
        raise WireError(f"unknown law {law}, estimator {estimator} or dense flag {dense}")
    named = {"multiple": multiple, "law": _LAWS[law], "estimator": _ESTIMATORS[estimator], "dense": bool(dense)}
    return Task(number, client, seed, rate, mu, steps, directions, clip, **named)


def _news(reader: "_Reader") -> News:
    settings = reader.take(_SETTINGS)
    tasks, weights, slopes = [], [], []
    for _ in range(reader.count("walks", limit=MAX_WALKS, size=_WALKER.size + 8)):
        tasks.append(_task(settings, reader.take(_WALKER)))
        weights.append(reader.take(struct.Struct("<f"))[0])
        slopes.append(reader.slopes())
    return News(tuple(tasks), tuple(slopes), tuple(weights))


def encode_reply(reply: Reply) -> bytes:
    """Returns the bytes of a reply: 35 bytes plus 4 per slope, and its tensors if it carries any.

    Raises:
      WireError: a slope is not a float32 value, or a tensor cannot be written.
    """
    loss = math.nan if math.isnan(reply.loss) else reply.loss
    parts = [_REPLY_BODY.pack(reply.round, reply.client, reply.examples, loss), _pack(reply.slopes)]
    if reply.delta is None:
        return _seal(_REPLY, [*parts, b"\0"])
    tensors = reply.delta.tensors
    _limit("tensors", len(tensors), MAX_TENSORS)
    parts += [b"\1", _COUNT.pack(len(tensors))]
    for name in sorted(tensors):
        parts += _tensor(name, tensors[name])
    return _seal(_REPLY, parts)


def decode_reply(data: bytes, *, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Reply:
    """Returns the reply that `encode_reply` was given.

    Args:
      data: the bytes.
      shapes: name -> shape every tensor must have, and no others; None accepts any.

    Raises:
      WireError: the bytes are not a valid reply, or its tensors are not those of `shapes`.
    """
    with _speaking("reply"):
        reader = _Reader(data, _REPLY)
        number, client, examples, loss = reader.take(_REPLY_BODY)
        slopes = reader.slopes()
        dense = reader.take(struct.Struct("<B"))[0]
        if dense > 1:
            raise WireError(f"unknown dense flag {dense}")
        delta = DenseDelta(reader.tensors(shapes)) if dense else None
        reader.end()
        return Reply(number, client, examples, loss, slopes, delta)


def _pack(slopes: Sequence[float]) -> bytes:
    _limit("slopes", len(slopes), MAX_SLOPES)
    plain = [math.nan if math.isnan(slope) else slope for slope in slopes]
    for slope in plain:
        if abs(slope) > _LARGEST or (slope != float(np.float32(slope)) and not math.isnan(slope)):
            raise WireError(f"Slopes must be float32 values, got {slope!r}; round it first.")
    return _COUNT.pack(len(plain)) + struct.pack(f"<{len(plain)}f", *plain)


def _tensor(name: str, tensor: Tensor) -> list[bytes]:
    label = name.encode(errors="replace")
    _limit("bytes in a tensor's name", len(label), MAX_NAME)
    _limit("dimensions", tensor.dim(), MAX_RANK)
    if tensor.dtype != torch.float32 or label.decode() != name:
        raise WireError(f"Tensor {name!r} must be float32 and its name text, got {tensor.dtype}; convert it first.")
    values = tensor.detach().cpu().contiguous().numpy().astype("<f4", copy=False)
    head = struct.pack(f"<H{len(label)}sB{tensor.dim()}Q", len(label), label, tensor.dim(), *tensor.shape)
    return [head, values.tobytes()]


def _seal(kind: int, parts: Sequence[bytes]) -> bytes:
    body = _HEAD.pack(_MAGIC, WIRE_VERSION, kind) + b"".join(parts)
    _limit("bytes in a message", len(body) + _COUNT.size, MAX_BYTES)
    return body + _COUNT.pack(zlib.crc32(body))


def _limit(what: str, got: int, limit: int) -> None:
    if got > limit:
        raise WireError(f"Too many {what}: at most {limit}, got {got}.")


@contextmanager
def _speaking(what: str) -> Iterator[None]:
    """Turns every complaint about a message's content into one `WireError`."""
    try:
        yield
    except (WireError, RunError, ValueError, OverflowError) as error:
        raise WireError(f"Not a valid {what}: {str(error).rstrip('.')}; have the sender send it again.") from error


class _Reader:
    """The body of one message, read from front to back and never beyond its end."""

    def __init__(self, data: bytes, kind: int) -> None:
        _limit("bytes in a message", len(data), MAX_BYTES)
        if len(data) < _HEAD.size + _COUNT.size:
            raise WireError(f"it has {len(data)} bytes, which is less than a header")
        magic, version, got = _HEAD.unpack_from(data)
        if magic != _MAGIC:
            raise WireError(f"it begins with {magic!r} instead of {_MAGIC!r}")
        if version != WIRE_VERSION:
            raise WireError(f"wire format {version}, expected {WIRE_VERSION}: both sides need the same fedmezo")
        if _COUNT.unpack_from(data, len(data) - _COUNT.size)[0] != zlib.crc32(memoryview(data)[: -_COUNT.size]):
            raise WireError("its checksum is wrong")
        if got != kind:
            raise WireError(f"it is of kind {got}, expected {kind}")
        self._data, self._at, self._stop = data, _HEAD.size, len(data) - _COUNT.size

    def _advance(self, size: int) -> int:
        if size > self._stop - self._at:
            raise WireError(f"{size} bytes expected at offset {self._at}, {self._stop - self._at} are there")
        self._at += size
        return self._at - size

    def take(self, form: struct.Struct) -> tuple[Any, ...]:
        return form.unpack_from(self._data, self._advance(form.size))

    def count(self, what: str, *, limit: int, size: int) -> int:
        """Returns a count, known to be within its limit and within the bytes left at `size` bytes or more each."""
        number = int(self.take(_COUNT)[0])
        _limit(what, min(limit + 1, number), limit)
        _limit(f"{what} for the bytes there", number, (self._stop - self._at) // size)
        return number

    def slopes(self) -> tuple[float, ...]:
        number = self.count("slopes", limit=MAX_SLOPES, size=4)
        return self.take(struct.Struct(f"<{number}f"))

    def tensors(self, shapes: Mapping[str, tuple[int, ...]] | None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for _ in range(self.count("tensors", limit=MAX_TENSORS, size=3)):
            length = self.take(struct.Struct("<H"))[0]
            _limit("bytes in a tensor's name", length, MAX_NAME)
            name = self.take(struct.Struct(f"<{length}s"))[0].decode()
            rank = self.take(struct.Struct("<B"))[0]
            _limit("dimensions", rank, MAX_RANK)
            shape = self.take(struct.Struct(f"<{rank}Q"))
            if found and name <= next(reversed(found)):
                raise WireError(f"tensor '{name}' is out of order")
            if shapes is not None and shapes.get(name) != shape:
                raise WireError(f"tensor '{name}' has shape {shape}, expected {shapes.get(name)}")
            # An empty tensor passes the check against the bytes there, whatever its other sizes claim.
            _limit("scalars in a tensor", math.prod(size for size in shape if size), MAX_BYTES)
            begin = self._advance(4 * math.prod(shape))
            values = np.frombuffer(self._data, "<f4", math.prod(shape), begin)
            found[name] = torch.from_numpy(values.astype(np.float32)).reshape(shape)
        if shapes is not None and found.keys() != shapes.keys():
            raise WireError(f"{len(shapes)} tensors expected, got {len(found)}")
        return found

    def end(self) -> None:
        if self._at != self._stop:
            raise WireError(f"{self._stop - self._at} bytes are left over")
