"""Who answered when, for the person at a server: one line per client, the latest of each."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from fedmezo.studies.page import duration, number, size

__all__ = ["Attendance"]

_MOST = 12  # clients with a line of their own; of more, those that were not heard for longest


@dataclass(frozen=True)
class _Seen:
    at: float
    round: int
    loss: float
    rate: float
    up: float
    down: float


@dataclass
class Attendance:
    """What was heard of each client so far.

    Attributes:
      now: seconds on a clock.
    """

    now: Callable[[], float] = time.monotonic
    _seen: dict[int, _Seen] = field(default_factory=dict)

    def hear(self, report: Any) -> None:
        """Takes a round in: a `RoundReport`."""
        for client, values in report.clients.items():
            before = self._seen.get(client)
            self._seen[client] = _Seen(
                self.now(),
                report.round,
                values.get("loss", math.nan),
                values.get("rate", math.nan),
                (before.up if before else 0) + values.get("bytes_up", 0),
                (before.down if before else 0) + values.get("bytes_down", 0),
            )

    def rows(self) -> list[Mapping[str, str]]:
        """Returns what is known of each client, by number; of many, those that were not heard for longest."""
        longest = sorted(self._seen, key=lambda client: (self._seen[client].at, client))[:_MOST]
        return [self._row(client, self._seen[client]) for client in sorted(longest)]

    def _row(self, client: int, seen: _Seen) -> Mapping[str, str]:
        return {
            "client": str(client),
            "round": str(seen.round + 1),
            "seen": f"{duration(self.now() - seen.at)} ago",
            "loss": number(seen.loss),
            "rate": f"{seen.rate:.3g}",
            "up": size(seen.up),
            "down": size(seen.down),
        }

    def table(self) -> Table:
        """Returns a table for the terminal."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        rows = self.rows()
        for name in rows[0] if rows else ():
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        return table

    def __rich__(self) -> Table:
        """Returns the table as it is at the moment it is drawn."""
        return self.table()
