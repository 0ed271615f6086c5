"""What comes over a network, as bytes: tasks, replies, calls and frames."""

import struct
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fedmezo.errors import WireError
from fedmezo.runtime.calls import decode_answer, decode_request, encode_answer, encode_request
from fedmezo.runtime.frames import get
from fedmezo.runtime.wire import decode_reply, decode_task, encode_reply, encode_task
from fuzzing import parties
from fuzzing.course import Check, Target, same
from fuzzing.mutation import sealed, sealed_after
from fuzzing.seeds import SHAPES, answers, replies, requests, tasks

__all__ = ["TARGETS"]


def _task(folder: Path, *, shapes: dict[str, tuple[int, ...]] | None = None) -> Check:
    def check(data: bytes) -> bool:
        try:
            task, told = decode_task(data, shapes=shapes)
        except WireError:
            return False
        again = encode_task(task, told)
        same(encode_task(*decode_task(again, shapes=shapes)), again)
        return True

    return check


def _reply(folder: Path, *, shapes: dict[str, tuple[int, ...]] | None = None) -> Check:
    def check(data: bytes) -> bool:
        try:
            reply = decode_reply(data, shapes=shapes)
        except WireError:
            return False
        again = encode_reply(reply)
        same(encode_reply(decode_reply(again, shapes=shapes)), again)
        return True

    return check


def _call(folder: Path, *, decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> Check:
    def check(data: bytes) -> bool:
        try:
            told = decode(data)
        except WireError:
            return False
        again = encode(told)
        if len(again) <= 1 << 12:
            same(decode(again), told)  # a longer sentence is cut, wherever that is
        return True

    return check


class _Pipe:
    """A socket out of which come some bytes, and then nothing."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def recv_into(self, room: memoryview) -> int:
        part = self._data[: min(len(room), 61)]
        self._data = self._data[len(part) :]
        room[: len(part)] = part
        return len(part)


def _frame(folder: Path) -> Check:
    def check(data: bytes) -> bool:
        taken = False
        for options in ({}, {"most": 64}, {"into": memoryview(bytearray(16))}):
            try:
                frame = bytes(get(_Pipe(data), **options))  # type: ignore[arg-type]
            except EOFError:
                continue
            same(frame, data[8 : 8 + len(frame)])
            taken = True
        return taken

    return check


def _frames() -> list[bytes]:
    return [
        struct.pack("<Q", size) + bytes(there) for size, there in ((0, 0), (16, 16), (64, 64), (9, 4), (1 << 62, 9))
    ]


TARGETS = (
    Target("task", tasks, _task, share=12, mend=sealed),
    Target("task (shapes known)", tasks, partial(_task, shapes=SHAPES), share=4, mend=sealed),
    Target("reply", replies, _reply, share=20, mend=sealed),
    Target("reply (shapes known)", replies, partial(_reply, shapes=SHAPES), share=10, mend=sealed),
    Target(
        "request",
        requests,
        partial(_call, decode=decode_request, encode=encode_request),
        share=22,
        mend=sealed_after({2: 9, 4: 9}),
    ),
    Target(
        "answer",
        answers,
        partial(_call, decode=decode_answer, encode=encode_answer),
        share=22,
        mend=sealed_after({2: 17}),
    ),
    Target("frame", _frames, _frame, share=12, most=1 << 12),
    *parties.TARGETS,
)
