"""How unlike the clients of a split are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmezo.errors import DataError

__all__ = ["SplitReport", "split_report"]


@dataclass(frozen=True, slots=True)
class SplitReport:
    """How uneven a split is.

    Attributes:
      sizes: records per client.
      histograms: per client, the number of records of each of its categories.
      distances: per client, the total variation distance, in [0, 1), of its category shares from all
        records'.
    """

    sizes: tuple[int, ...]
    histograms: tuple[Mapping[str, int], ...]
    distances: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, ready for JSON."""
        return {
            "sizes": list(self.sizes),
            "histograms": [dict(histogram) for histogram in self.histograms],
            "distances": list(self.distances),
        }


def split_report(parts: Sequence[Sequence[int]], labels: Sequence[str]) -> SplitReport:
    """Returns the report of a split; the shares of all records are those of the records in `parts`.

    Raises:
      DataError: a client has no record.
    """
    counts = [Counter(labels[index] for index in part) for part in parts]
    for client, part in enumerate(parts):
        if not part:
            raise DataError(f"Client {client} has no record; split again with fewer clients.")
    total = Counter[str]()
    for count in counts:
        total.update(count)
    size = total.total()
    distances = tuple(
        sum(abs(count[label] / count.total() - total[label] / size) for label in total) / 2 for count in counts
    )
    ordered = tuple(dict(sorted(count.items())) for count in counts)
    return SplitReport(tuple(len(part) for part in parts), ordered, distances)
