"""What a round takes in: the replies through their bytes, with their tasks, and how many bytes went each way."""

from collections.abc import Sequence

from fedmezo.fl.algorithm import Reply, Task
from fedmezo.runtime.walkers import Walked
from fedmezo.runtime.wire import decode_reply, encode_reply

__all__ = ["taken"]

Sizes = dict[int, tuple[int, int]]


def taken(
    tasks: Sequence[Task], sizes: Sequence[int], walked: Sequence[Walked]
) -> tuple[list[Task], list[Reply], Sizes]:
    """Returns all tasks of a round, its replies, and client -> bytes that went to it and came from it.

    A sum's bytes are those of all who are in it; where nothing travelled, as if each had sent as many numbers.

    Args:
      tasks: the tasks that were sent.
      sizes: their bytes, with what brought their clients up to date.
      walked: what came of them.
    """
    extra = [task for one in walked for task in one.tasks]
    received = [encode_reply(reply) for one in walked for reply in one.replies]
    replies = [decode_reply(data) for data in received]
    down = {task.client: size for task, size in zip(tasks, sizes, strict=True)}
    down |= {task.client: sum(sizes) for task in extra}
    senders = {task.client: reply.examples for task in extra for reply in replies if reply.client == task.client}
    found: Sizes = {
        reply.client: (down[reply.client], len(data) * senders.get(reply.client, 1))
        for reply, data in zip(replies, received, strict=True)
    }
    for one in walked:
        found |= one.sizes or {}
    return [*tasks, *extra], replies, found
