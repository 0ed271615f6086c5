"""What Flower runs for every message to a client: it carries bytes to the worker process and back.

Flower starts a process per message, so nothing dear may be imported here: no torch, and of fedmezo only the door to the
process that has the model (`resident.py`).
"""

from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedmezo.errors import RunError
from fedmezo.runtime.resident import ask

__all__ = ["forward"]

_PATIENCE = 120.0  # seconds for the worker to load, or to be started again


def forward(msg: Message, context: Context) -> Message:
    """Returns the worker's answer to the bytes in `msg`.

    Args:
      msg: one ConfigRecord "fedmezo" with the key "payload" (bytes); the reply has the same.
      context: its node configuration has "worker", the path of the worker's socket, and may have "patience", seconds.

    Raises:
      RunError: no such record, no such path, or what `ask` raises; Flower makes an error reply of it.
    """
    worker, patience = context.node_config.get("worker"), context.node_config.get("patience", _PATIENCE)
    if not isinstance(worker, str):
        raise RunError("This SuperNode has no worker in its node configuration; start it with `fedmezo client`.")
    if not isinstance(patience, int | float):
        raise RunError(f"The patience in a node configuration is a number of seconds, got {patience!r}.")
    answer = ask(Path(worker), _payload(msg), patience=patience)
    return Message(content=RecordDict({"fedmezo": ConfigRecord({"payload": answer})}), reply_to=msg)


def _payload(msg: Message) -> bytes:
    record = msg.content.get("fedmezo") if msg.has_content() else None
    payload = record.get("payload") if isinstance(record, ConfigRecord) else None
    if not isinstance(payload, bytes):
        raise RunError('A message without bytes at "fedmezo"/"payload" is not from a fedmezo server; see what it runs.')
    return payload
