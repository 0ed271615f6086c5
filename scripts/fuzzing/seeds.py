"""Valid messages of every kind, from which hostile ones are made."""

import math
from dataclasses import replace
from typing import Any

import torch

from fedmezo.fl.algorithm import Reply, Task
from fedmezo.fl.whole import whole
from fedmezo.runtime.calls import (
    UNCHECKED,
    Addend,
    Behind,
    Done,
    Hello,
    Noted,
    Notice,
    Refused,
    Share,
    Stranger,
    Walk,
    Welcome,
    check_of,
    encode_answer,
    encode_request,
)  # fmt: skip
from fedmezo.runtime.wire import News, Sums, Values, encode_reply, encode_task
from fedmezo.zo.params import Params
from fedmezo.zo.seedsum import DenseDelta

__all__ = ["HELLO", "RUN", "SHAPES", "TASK", "answers", "asked", "params", "replies", "requests", "tasks"]

TASK = Task(3, 2, 2**64 - 1, 1e-5, 1e-3, 2, clip=12.5)
_POOLED = replace(
    TASK, seed=7, directions=4, multiple=2.5, law="rademacher", estimator="forward", dense=True, pool=3,
    odds=(1, 258, 65535), importance=True, coding="sign", normalise=True, momentum=0.5,
)  # fmt: skip
_SHARED = replace(TASK, shared=True, coding="float16")
_WHOLE = whole(replace(TASK, shared=True), (1.0, -0.5), examples=9, loss=1.5)
_TENSORS = {"b": torch.tensor(-0.0), "a": torch.arange(6.0).reshape(2, 3)}
SHAPES = {name: tuple(tensor.shape) for name, tensor in _TENSORS.items()}
_REPLY = Reply(3, 2, 8, 1.25, (1.5, math.nan))
RUN = "ab" * 32
HELLO = Hello(RUN, "0.1.0", 4, 1, "cd" * 32, "ef" * 32, '{"federation":{"rounds":3}}')
_OLD_TASKS = (
    "464d5a4f020103000000fffffffffffffffffca9f1d24d62503f00000000000008400000000000000000000000000000"
    "0000020000000100000000000000000000000002000000f168e388b5f8e43e0000000000002940000100000003000000"
    "fffffffffffffffffca9f1d24d62503f0000000000000840000000000000000000000000000000000200000001000000"
    "0000000000000000000200000002000000f168e388b5f8e43e0000000000002940abaaaa3e020000000000803f000000"
    "4005000000f168e388b5f8f43e0000000000002940abaa2a3f020000000000c07f000040407a359da5",
)
_OLD_REPLIES = ("464d5a4f0202030000000200000008000000000000000000f43f0409000000310102000000050000000600000000fd67b651",)


def _news() -> list[News]:
    walks = (TASK, replace(TASK, client=5, rate=2e-5))
    pooled = (_POOLED, replace(_POOLED, client=5))
    many = tuple(replace(_SHARED, client=client) for client in range(4))
    return [
        News(walks, ((1.0, 2.0), (math.nan, 3.0)), (1 / 3, 2 / 3)),
        News(pooled, ((1.0, -1.0), (0.0, math.nan, 1.0)), (0.25, 0.75)),
        News(many, ((0.5, -0.25),) * 4, (0.25,) * 4),
        News(_WHOLE[:1], (_WHOLE[1].slopes,), (1.0,)),
    ]


def tasks() -> list[bytes]:
    """Returns the bytes of valid tasks with all that may go with them."""
    news = _news()
    typed = {"a": torch.ones(2, 3).half(), "b": torch.tensor(2.0).bfloat16()}
    told: list[tuple[Task, Any]] = [
        (TASK, ()), (_POOLED, ()), (_SHARED, ()), (_WHOLE[0], ()), (replace(TASK, method="adamw", weight_decay=0.1), ()),
        (TASK, news), (_POOLED, news[1:2]), (_SHARED, news[2:3] * 3), (_SHARED, news[3:]),
        (TASK, DenseDelta(_TENSORS)), (TASK, Values(typed)), (TASK, DenseDelta({})),
        *((_POOLED, Sums(7, 3, coding, values)) for coding in ("float32", "float16", "bfloat16")
          for values in ((1.5, 0.0, -0.25), (0.0, 0.0, 3.0))),
    ]  # fmt: skip
    return [encode_task(task, content) for task, content in told] + [bytes.fromhex(old) for old in _OLD_TASKS]


def replies() -> list[bytes]:
    """Returns the bytes of valid replies."""
    codes = ("float32", "float16", "bfloat16", "float8", "sign")
    slopes = (1.0, -1.0, math.nan, 0.0, 1.0, 1.0, -1.0, -1.0, 1.0)
    found = [replace(_REPLY, coding=coding, slopes=slopes) for coding in codes]
    found += [_REPLY, replace(_REPLY, slopes=(), loss=math.nan), replace(_REPLY, delta=DenseDelta(_TENSORS))]
    return [encode_reply(reply) for reply in found] + [bytes.fromhex(old) for old in _OLD_REPLIES]


def requests() -> list[bytes]:
    """Returns the bytes of valid requests; among them such as the client of `_client` follows."""
    check = check_of(RUN, params().digest())
    walks = [Walk(check, data) for data in [*tasks(), encode_task(asked(0))]]
    walks += [Walk(check, encode_task(asked(1), _said())), Addend(UNCHECKED, tasks()[0])]
    walks.append(Walk(check, encode_task(asked(2), Values(dict(params())))))
    for law in ("gaussian", "rademacher"):
        pooled = replace(asked(1), law=law, pool=3)
        item = replace(_said()[0], tasks=tuple(replace(task, law=law) for task in _said()[0].tasks))
        walks.append(Walk(UNCHECKED, encode_task(pooled, Sums(7, 3, "float32", (1.5, 0.0, -0.25)))))
        walks.append(Walk(check, encode_task(replace(asked(1), law=law), (item,))))
    return [encode_request(told) for told in (*walks, HELLO, Notice("Somebody else is client 2."))]


def answers() -> list[bytes]:
    """Returns the bytes of valid answers."""
    good = Reply(0, 2, 8, 1.25, (1.5, math.nan))
    told = [Done(data, 4, 100, 0.5) for data in [*replies(), encode_reply(good)]]
    welcome = Welcome(RUN, 2, "0" * 32, 40, 0)
    others = (welcome, Behind(3), Stranger(), Refused("No room."), Noted(), Share(b"\0\0\x80\x3f" * 4))
    return [encode_answer(answer) for answer in (*told, *others)]


def params() -> Params:
    generator = torch.Generator().manual_seed(3)
    return Params({"b": torch.randn(2, 3, generator=generator), "a": torch.randn(4, generator=generator)})


def asked(number: int) -> Task:
    return Task(number, 2, 7, 1e-2, 1e-3, 2)


def _said() -> tuple[News, ...]:
    return (News((asked(0), replace(asked(0), client=4)), ((0.5, 1.0), (math.nan, -2.0)), (0.5, 0.5)),)
