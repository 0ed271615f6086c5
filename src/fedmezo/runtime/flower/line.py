"""The way to the clients through Flower's Message API."""

from collections.abc import Collection, Mapping, Sequence

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmezo.runtime.flower.shim import KEY, NAME
from fedmezo.runtime.line import Mean, Parcel, Returned

__all__ = ["FlowerLine"]


class FlowerLine:
    """A Flower `Grid` as a `SecureLine`: one record of bytes per message, in both directions."""

    def __init__(self, grid: Grid, *, ttl: float) -> None:
        """Takes the grid; `ttl` is how many seconds a message is kept for a node that does not fetch it."""
        self._grid, self._ttl = grid, ttl

    def nodes(self) -> frozenset[int]:
        """Returns the nodes that are online."""
        return frozenset(self._grid.get_node_ids())

    def send(self, parcels: Sequence[Parcel]) -> list[str | None]:
        """Sends parcels; returns the messages' ids, None for what Flower did not take."""
        messages = [
            Message(
                RecordDict({NAME: ConfigRecord({KEY: parcel.payload})}),
                parcel.node,
                MessageType.QUERY if parcel.greeting else MessageType.TRAIN,
                ttl=self._ttl,
            )
            for parcel in parcels
        ]
        tickets: list[str | None] = list(self._grid.push_messages(messages))
        return tickets or [None] * len(parcels)

    def receive(self, tickets: Collection[str]) -> list[Returned]:
        """Returns what came back by now; Flower hands every reply out once."""
        return [_returned(message) for message in self._grid.pull_messages(set(tickets))] if tickets else []

    def mean(self, requests: Mapping[int, bytes], *, numbers: int, enough: int, deadline: float) -> Mean:
        """Returns the mean of the nodes' shares by secure aggregation; see `SecureLine`."""
        from fedmezo.runtime.flower.secagg import secure_mean

        return secure_mean(self._grid, requests, numbers=numbers, enough=enough, deadline=deadline)


def _returned(message: Message) -> Returned:
    ticket = message.metadata.reply_to_message_id
    if message.has_error():
        error = message.error
        return Returned(ticket, None, f"Flower's error {error.code}: {' '.join(str(error.reason).split())[:400]}")
    record = message.content.get(NAME)
    payload = record.get(KEY) if isinstance(record, ConfigRecord) else None
    if not isinstance(payload, bytes):
        return Returned(ticket, b"")
    return Returned(ticket, payload)
