"""The way to machines of clients, whoever runs it: parcels to nodes, and what comes back.

A node is whatever the network knows a machine by, and may be another one after each restart; who a client is, it says
itself (`calls.py`). `runtime/flower/line.py` is the way through Flower; tests have one inside a process.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    # A configuration, which needs a number of this module, is read without numpy.
    import numpy as np
    from numpy.typing import NDArray


__all__ = ["FEWEST", "Line", "Mean", "Parcel", "Returned", "SecureLine"]

FEWEST = 3  # clients that share a secret sum: of two, each would know the other's part


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


@dataclass(frozen=True)
class Mean:
    """What came of a secure mean.

    Attributes:
      values: the mean of the shares; None where too few stayed to the end, and then nobody's share is known.
      took: the nodes whose shares are in it.
      failed: node -> what the network says went wrong.
      sizes: node -> bytes that went to it and came from it.
    """

    values: "NDArray[np.float64] | None"
    took: frozenset[int] = frozenset()
    failed: Mapping[int, str] = field(default_factory=dict)
    sizes: Mapping[int, tuple[int, int]] = field(default_factory=dict)


@runtime_checkable
class SecureLine(Line, Protocol):
    """A way that can also take the mean of what nodes answer without anyone seeing a single answer."""

    def mean(self, requests: Mapping[int, bytes], *, numbers: int, enough: int, deadline: float) -> Mean:
        """Returns the mean of the shares that nodes answer with; waits for it.

        Args:
          requests: node -> an `Addend`, for `FEWEST` nodes at least.
          numbers: how many numbers a share has.
          enough: shares that the mean is of at least, two or more.
          deadline: seconds that each of its exchanges may take.
        """
