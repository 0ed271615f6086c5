"""Which of a forward's tokens belong to which lane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor

from fedmezo.models.scratch import Lane

__all__ = ["Span", "axis_of", "cut", "each_pair", "lay_out"]

_GROUP = 16  # lanes whose weights are in scratch at once


@dataclass(frozen=True, slots=True)
class Span:
    """Lanes [first, first + count) of `tokens` tokens each, lying end to end from token `start`."""

    first: int
    count: int
    start: int
    tokens: int

    @property
    def stop(self) -> int:
        """The first token after the span."""
        return self.start + self.count * self.tokens


def lay_out(tokens: Sequence[int]) -> tuple[Span, ...]:
    """Returns the spans of lanes with these token counts; neighbours with equal counts share a span."""
    spans, lane, start = [], 0, 0
    for size, group in groupby(tokens):
        left = sum(1 for _ in group)
        while left:
            count = min(left, _GROUP)
            spans.append(Span(lane, count, start, size))
            lane, start, left = lane + count, start + count * size, left - count
    return tuple(span for span in spans if span.tokens)


def each_pair(
    lanes: Sequence[Lane], spans: Sequence[Span], *, pairs: bool
) -> Iterator[tuple[Sequence[Lane], int, int]]:
    """Yields (lanes, first token, tokens of each): mirrored neighbours together when `pairs`, all others alone."""
    for span in spans:
        at = 0
        while at < span.count:
            first = span.first + at
            both = pairs and at + 1 < span.count and lanes[first].mirrors(lanes[first + 1])
            count = 2 if both else 1
            yield lanes[first : first + count], span.start + at * span.tokens, span.tokens
            at += count


def axis_of(x: Tensor, total: int) -> int | None:
    """Returns the axis of `x` along which the tokens lie: [1, total, ...] or, where a model folds, [total, ...]."""
    if x.dim() > 1 and x.shape[0] == 1 and x.shape[1] == total:
        return 1
    return 0 if x.dim() > 1 and x.shape[0] == total else None


def cut(value: Any, *, axis: int, start: int, tokens: int, total: int) -> Any:
    """Returns the part of a tensor that belongs to some tokens; anything without a token axis as it is."""
    along = isinstance(value, Tensor) and value.dim() > axis and value.shape[axis] == total
    return value.narrow(axis, start, tokens) if along else value
