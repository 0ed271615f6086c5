"""News, the walks of earlier rounds, and their bytes; with those of a task's settings, which news share.

Numbers and codes as in `binary.py` and `scalars.py`:

    settings  what all tasks of a round share:
              round u32, seed u64, mu f64, multiple f64, momentum f64, weight_decay f64,
              steps u32, directions u32, pool u32,
              law u8 (0 gaussian, 1 rademacher), estimator u8 (0 two-point, 1 forward, 2 forward-half),
              coding u8 (0 float32, 1 float16, 2 bfloat16, 3 float8, 4 sign),
              method u8 (0 walk, 1 sgd, 2 adamw),
              flags u8 (sum of 1 dense, 2 importance, 4 normalise, 8 odds are there, 16 shared: not before version 4);
              when odds are there: as many u16 as `pool` says
    walker    client u32, rate f64, clip f64
    news      form      u8, sum of 1 settings are there, 2 odds are there (never with 1, whose flags say it),
                        4 clients are gaps, 8 all walks have one rate, 16 one clip, 32 one weight, 64 as many slopes
              settings  with form 1; otherwise round u32, with form 2 the odds, and the rest is that of the task the
                        news go with
              count     u32 of walks, at least 1
              clients   as many u32; with form 4 as many numbers of variable length, each what is to be added to the
                        client before, or to 0
              rates f64, clips f64, weights f32, counts of slopes u32: one of each where the form says so, otherwise as
                        many as walks
              codes     of the slopes of all walks, walk after walk

Version 2 wrote news otherwise; such messages are read and no longer written:

    news      settings  always
              count     u32, then as many walks: walker, weight f32, slopes
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, chain, pairwise

import numpy as np

from fedmezo.errors import RunError, WireError
from fedmezo.fl.algorithm import METHODS, Task
from fedmezo.runtime.binary import COUNT, Reader, limit, pack_numbers
from fedmezo.runtime.scalars import (
    LARGEST,
    MAX_CODES,
    MAX_POOL,
    SLOPE_BITS,
    listed,
    pack_codes,
    read_codes,
    read_odds,
    read_slopes,
)
from fedmezo.runtime.twins import twins
from fedmezo.zo.coding import CODINGS
from fedmezo.zo.estimate import Estimator
from fedmezo.zo.noise import Law

__all__ = [
    "MAX_NEWS",
    "NEWS_BYTES",
    "OLD_NEWS_BYTES",
    "News",
    "pack_news",
    "pack_task",
    "read_news",
    "read_old_news",
    "read_task",
]

MAX_NEWS = 1 << 20
MAX_WALKS = 1 << 20
# The least that news take: one walk without slopes.
NEWS_BYTES = 34
OLD_NEWS_BYTES = 93

_LAWS: tuple[Law, ...] = ("gaussian", "rademacher")
_ESTIMATORS: tuple[Estimator, ...] = ("two-point", "forward", "forward-half")
_SETTINGS = struct.Struct("<IQddddIII")
_WALKER = struct.Struct("<Idd")
_WEIGHT = struct.Struct("<f")
_OWN, _ODDS, _GAPS = 1, 2, 4
# Rates, clips, weights, counts of slopes: flag that one stands for all walks, numpy type, bytes.
_COLUMNS = ((8, "<f8", 8), (16, "<f8", 8), (32, "<f4", 4), (64, "<u4", 4))


def _settings(task: Task) -> bytes:
    """Returns what all walks of one round share, except the odds themselves."""
    scales = (task.mu, task.multiple, task.momentum, task.weight_decay)
    numbers = _SETTINGS.pack(task.round, task.seed, *scales, task.steps, task.directions, task.pool)
    names = (_LAWS.index(task.law), _ESTIMATORS.index(task.estimator), CODINGS.index(task.coding))
    marks = (task.dense, task.importance, task.normalise, bool(task.odds), task.shared)
    flags = sum(mark << place for place, mark in enumerate(marks))
    return numbers + bytes([*names, METHODS.index(task.method), flags])


def _lasting(task: Task) -> tuple[bytes, int]:
    """Returns the settings that do not change by round."""
    settings = _settings(task)
    return settings[COUNT.size : -1], settings[-1] & ~8


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


def pack_task(task: Task) -> list[bytes]:
    """Returns the bytes of a task: its settings and its walker."""
    return [*_pack_settings(task), _WALKER.pack(task.client, task.rate, task.clip)]


def _pack_settings(task: Task) -> list[bytes]:
    limit("seeds in a pool", task.pool, MAX_POOL)
    return [_settings(task), _odds(task.odds)]


@lru_cache(maxsize=4)
def _odds(odds: tuple[int, ...]) -> bytes:
    return np.array(odds, "<u2").tobytes()


def pack_news(item: News, *, task: Task) -> list[bytes]:
    """Returns the bytes of news that go with a task.

    Raises:
      WireError: the coding cannot write a slope exactly, or there is too much of something.
    """
    first, number = item.tasks[0], sum(map(len, item.slopes))
    limit("walks", len(item.tasks), MAX_WALKS)
    limit("slopes", number, MAX_CODES)
    if _lasting(first) == _lasting(task):
        form, head = _ODDS * bool(first.odds), [COUNT.pack(first.round), _odds(first.odds)]
    else:
        form, head = _OWN, _pack_settings(first)
    flag, clients = _pack_clients([walker.client for walker in item.tasks])
    form |= flag
    rates, clips = [walker.rate for walker in item.tasks], [walker.clip for walker in item.tasks]
    columns = []
    for (flag, kind, size), values in zip(_COLUMNS, (rates, clips, item.weights, map(len, item.slopes)), strict=True):
        column = np.array([*values], kind).tobytes()
        alike = column == column[:size] * len(item.tasks)
        form |= flag * alike
        columns.append(column[:size] if alike else column)
    slopes = np.fromiter(chain.from_iterable(item.slopes), np.float64, number)
    return [bytes([form]), *head, COUNT.pack(len(item.tasks)), clients, *columns, *pack_codes(slopes, first.coding)]


def _pack_clients(clients: list[int]) -> tuple[int, bytes]:
    """Returns the flag of gaps and the gaps where these are in order and no longer, otherwise 0 and the clients."""
    gaps, plain = [after - before for before, after in pairwise([0, *clients])], np.array(clients, "<u4").tobytes()
    short = pack_numbers(gaps) if min(gaps) >= 0 else None
    return (_GAPS, short) if short is not None and len(short) <= len(plain) else (0, plain)


def read_task(reader: Reader) -> Task:
    """Returns the task that `pack_task` was given."""
    shared = _read_settings(reader)
    client, rate, clip = reader.take(_WALKER)
    return replace(shared, client=client, rate=rate, clip=clip)


def _read_settings(reader: Reader) -> Task:
    """Returns the task of a round that is nobody's yet."""
    number, seed, mu, multiple, momentum, decay, steps, directions, pool = reader.take(_SETTINGS)
    law = _LAWS[reader.byte("law", below=len(_LAWS))]
    estimator = _ESTIMATORS[reader.byte("estimator", below=len(_ESTIMATORS))]
    coding = CODINGS[reader.byte("coding", below=len(CODINGS))]
    method = METHODS[reader.byte("method", below=len(METHODS))]
    flags = reader.byte("flags", below=32 if reader.version > 3 else 16)
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
        shared=bool(flags & 16),
    )


def read_news(reader: Reader, task: Task) -> News:
    """Returns the news that `pack_news` was given, with the same task."""
    form = reader.byte("form of news", below=128)
    shared = _read_round(reader, form, task)
    sizes = [1 if form & _GAPS else 4, *(0 if form & flag else size for flag, _, size in _COLUMNS)]
    count = reader.count("walks", most=MAX_WALKS, bits=8 * sum(sizes))
    if not count:
        raise WireError("news of no walk")
    clients = np.cumsum(reader.numbers("clients", count)) if form & _GAPS else reader.array("<u4", count)
    rates, clips, weights, counts = (
        reader.array(kind, 1).tolist() * count if form & flag else reader.array(kind, count).tolist()
        for flag, kind, _ in _COLUMNS
    )
    slopes = _read_slopes(reader, shared, counts)
    return _news(twins(shared, list(zip(clients.tolist(), rates, clips, strict=True))), slopes, weights)


def _read_slopes(reader: Reader, shared: Task, counts: Sequence[int]) -> tuple[tuple[float, ...], ...]:
    """Returns the slopes of all walks, as many of each as `counts` says."""
    number = sum(counts)
    reader.room("slopes", number, most=MAX_CODES, bits=SLOPE_BITS[shared.coding])
    limit("slopes in a walk", max(counts), shared.slopes)
    slopes = listed(read_codes(reader, shared.coding, number), shared.coding)
    return tuple([tuple(slopes[end - size : end]) for size, end in zip(counts, accumulate(counts), strict=True)])


def _news(tasks: tuple[Task, ...], slopes: tuple[tuple[float, ...], ...], weights: Sequence[float]) -> News:
    """Returns news whose tasks are known to be of one round, after the other checks of `News`.

    Raises:
      RunError: the round was no walk, or a slope or weight is infinite.
    """
    News(tasks[:1], slopes[:1], tuple(weights[:1]))
    for walked, weight in zip(slopes, weights, strict=True):
        if any(map(math.isinf, walked)) or not abs(weight) <= LARGEST:
            raise RunError("News: slopes and weights must be finite, or nan for a skipped step.")
    item = object.__new__(News)
    for name, value in (("tasks", tasks), ("slopes", slopes), ("weights", tuple(weights))):
        object.__setattr__(item, name, value)
    return item


def _read_round(reader: Reader, form: int, task: Task) -> Task:
    """Returns the task of the round that news are of, which is nobody's."""
    if form & _OWN:
        if form & _ODDS:
            raise WireError(f"unknown form of news {form}")
        return _read_settings(reader)
    number = int(reader.take(COUNT)[0])
    odds = read_odds(reader, task.pool) if form & _ODDS else ()
    return replace(task, round=number, client=0, rate=0.0, clip=math.inf, odds=odds)


def read_old_news(reader: Reader) -> News:
    """Returns news of a message of version 2."""
    shared = _read_settings(reader)
    walkers, weights, slopes = [], [], []
    for _ in range(reader.count("walks", most=MAX_WALKS, bits=8 * (_WALKER.size + 8))):
        walkers.append(reader.take(_WALKER))
        weights.append(reader.take(_WEIGHT)[0])
        slopes.append(read_slopes(reader, shared.coding, most=shared.slopes))
    if not walkers:
        raise WireError("news of no walk")
    return _news(twins(shared, walkers), tuple(slopes), weights)
