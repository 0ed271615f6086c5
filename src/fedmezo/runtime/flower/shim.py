"""What Flower runs for every message to a client: it carries bytes to the worker process and back.

Flower starts a process per message, so nothing dear may be imported here: no torch, and of fedmezo only the door to the
process that has the model (`resident.py`).
"""

from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedmezo.errors import RunError
from fedmezo.runtime.calls import ADDEND
from fedmezo.runtime.resident import ask

__all__ = ["KEY", "NAME", "asked", "forward"]

NAME, KEY = "fedmezo", "payload"  # of the one record that a message has, and of the bytes in it

_PATIENCE = 120.0  # seconds for the worker to load, or to be started again


def forward(msg: Message, context: Context, *, answer: Callable[[bytes], bytes] | None = None) -> Message:
    """Returns the worker's answer to the bytes in `msg`.

    Args:
      msg: one ConfigRecord "fedmezo" with the key "payload" (bytes); the reply has the same.
      context: its node configuration has "worker", the path of the worker's socket, and may have "patience", seconds.
      answer: who answers in this process instead of a worker.

    Raises:
      RunError: no such record, one that asks for what only a sum may show, or as `asked`.
    """
    payload = _payload(msg)
    if payload[:1] == ADDEND:
        raise RunError("What a client adds to a sum leaves its machine masked only; the server asked for it as it is.")
    got = answer(payload) if answer is not None else asked(payload, context)
    return Message(content=RecordDict({NAME: ConfigRecord({KEY: got})}), reply_to=msg)


def asked(payload: bytes, context: Context) -> bytes:
    """Returns the worker's answer to some bytes; `context` is as in `forward`.

    Raises:
      RunError: no such path, or what `ask` raises; Flower makes an error reply of it.
    """
    worker, patience = context.node_config.get("worker"), context.node_config.get("patience", _PATIENCE)
    if not isinstance(worker, str):
        raise RunError("This SuperNode has no worker in its node configuration; start it with `fedmezo client`.")
    if not isinstance(patience, int | float):
        raise RunError(f"The patience in a node configuration is a number of seconds, got {patience!r}.")
    return ask(Path(worker), payload, patience=patience)


def _payload(msg: Message) -> bytes:
    record = msg.content.get(NAME) if msg.has_content() else None
    payload = record.get(KEY) if isinstance(record, ConfigRecord) else None
    if not isinstance(payload, bytes):
        raise RunError('A message without bytes at "fedmezo"/"payload" is not from a fedmezo server; see what it runs.')
    return payload
