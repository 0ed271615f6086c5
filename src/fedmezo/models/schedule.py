"""Which rows of which points share a forward pass."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fedmezo.fl.algorithm import Point
from fedmezo.models.loss import Example, Row, RowScore, Tally, tally
from fedmezo.models.scratch import Lane

__all__ = ["Job", "fill", "passes", "token_budget"]

# On a CPU larger passes were no faster.
_MOST_TOKENS = {"cpu": 1024, "cuda": 16384}
_SHARE = 16  # activations may take this part of the device's memory


def token_budget(model: Any) -> int:
    """Returns how many tokens may share a forward pass of `model`: what its device's memory holds, to a limit.

    It goes by the memory the device has, not by what is free just now: how many sequences share a pass changes the last
    bits of their losses, and one machine shall always compute the same.
    """
    config, device = model.config, next(model.parameters()).device
    width = int(getattr(config, "hidden_size", 0) or 1024)
    inner = int(getattr(config, "intermediate_size", 0) or 4 * width)
    token = next(model.parameters()).element_size() * (8 * width + 3 * inner)
    fitting: int = _memory(device) // _SHARE // token
    return max(1, min(_MOST_TOKENS.get(device.type, _MOST_TOKENS["cuda"]), fitting))


def _memory(device: torch.device) -> int:
    """Returns the bytes of memory the device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(eq=False, slots=True)
class Job:
    """One point with its batch, flattened to rows.

    Attributes:
      index: the point's place in the caller's list.
      point: where to evaluate.
      batch: on what.
      rows: the rows of all examples.
      options: the option tokens of each row.
    """

    index: int
    point: Point
    batch: Sequence[Example]
    rows: list[Row] = field(init=False)
    options: list[tuple[int, ...]] = field(init=False)

    def __post_init__(self) -> None:
        """Flattens the batch."""
        self.rows = [row for example in self.batch for row in example.rows]
        self.options = [example.options for example in self.batch for _ in example.rows]

    @property
    def lane(self) -> Lane:
        """The setting of its point."""
        return Lane(self.point.params, self.point.seed, self.point.offset)

    @property
    def tokens(self) -> int:
        """How many tokens a forward pass reads for it; a row's last token is never read."""
        return sum(len(row.ids) - 1 for row in self.rows)

    def order(self) -> tuple[float, ...]:
        """Returns the sort key: long batches first, mirrored points side by side, nothing of the caller's order."""
        point = self.point
        return (-self.tokens, point.client, point.round, point.step, point.seed, abs(point.offset), -point.offset)

    def loss(self, scores: Sequence[RowScore]) -> float:
        """Returns the batch's loss from the scores of its rows."""
        total, rest = Tally(), list(scores)
        for example in self.batch:
            mine, rest = rest[: len(example.rows)], rest[len(example.rows) :]
            total += tally(example, mine)
        return total.loss


def passes(work: Sequence[Job], *, budget: int, most: int | None) -> Iterator[list[tuple[int, int]]]:
    """Yields the (job, row) pairs of each forward pass; both sides of a pair of mirrored points stay together.

    Args:
      work: in order.
      budget: tokens per pass, when `most` is None.
      most: points per pass; None for no limit.
    """
    units: list[tuple[int, int]] = []
    used, jobs = 0, set[int]()
    for group in _mirrors(work, most=most):
        for row in range(len(work[group[0]].rows)):
            cost = sum(len(work[at].rows[row].ids) - 1 for at in group)
            crowded = most is not None and len(jobs | set(group)) > most
            if units and (crowded or (most is None and used + cost > budget)):
                yield units
                units, used, jobs = [], 0, set()
            units += [(at, row) for at in group]
            jobs |= set(group)
            used += cost
    if units:
        yield units


def _mirrors(work: Sequence[Job], *, most: int | None) -> Iterator[list[int]]:
    at = 0
    while at < len(work):
        pair = at + 1 < len(work) and (most is None or most > 1) and _mirrored(work[at].point, work[at + 1].point)
        yield [at, at + 1] if pair else [at]
        at += 2 if pair else 1


def _mirrored(one: Point, other: Point) -> bool:
    same = one.params is other.params and (one.client, one.round, one.step) == (other.client, other.round, other.step)
    return same and Lane(one.params, one.seed, one.offset).mirrors(Lane(other.params, other.seed, other.offset))


def fill(
    places: Sequence[tuple[int, int]], *, budget: int, size: Callable[[tuple[int, int]], int]
) -> Iterator[list[tuple[int, int]]]:
    """Yields neighbours that fit the token budget together, or one alone that does not."""
    group: list[tuple[int, int]] = []
    used = 0
    for place in places:
        if group and used + size(place) > budget:
            yield group
            group, used = [], 0
        group.append(place)
        used += size(place)
    yield group
