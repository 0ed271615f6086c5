"""The way to machines of clients, whoever runs it: parcels to nodes, and what comes back.

A node is whatever the network knows a machine by, and may be another one after each restart; who a client is, it says
itself (`calls.py`). `runtime/flower/line.py` is the way through Flower; tests have one inside a process.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Line", "Parcel", "Returned"]


@dataclass(frozen=True, slots=True)
class Parcel:
    """Bytes for a node; `greeting` says that they are a handshake."""

    node: int
    payload: bytes
    greeting: bool = False


@dataclass(frozen=True, slots=True)
class Returned:
    """What came back for a parcel.

    Attributes:
      ticket: what `Line.send` gave for the parcel.
      payload: the answer; None where there was a failure.
      failure: what the network says went wrong.
    """

    ticket: str
    payload: bytes | None
    failure: str = ""


class Line(Protocol):
    """The way to the clients' machines."""

    def nodes(self) -> frozenset[int]:
        """Returns the nodes that are there now."""

    def send(self, parcels: Sequence[Parcel]) -> list[str | None]:
        """Sends parcels; returns a ticket for each, None for what could not be sent. Does not wait."""

    def receive(self, tickets: Collection[str]) -> list[Returned]:
        """Returns what came back by now for these tickets, each once. Does not wait."""
