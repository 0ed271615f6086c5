"""Losses from label positions only: logits in chunks, sums in float64, no [T, V] tensor.

Two losses. "Answer": mean negative log-likelihood over all label tokens of a batch, as Hugging Face does. "Choices":
mean over examples of -log softmax(score)[answer], where a score is the logit of an option's one token, or the mean
label log-probability of a candidate row.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from fedmezo.errors import DataError

__all__ = ["CHUNK", "Example", "Piece", "Row", "RowScore", "Tally", "label_scores", "loss_weight", "tally"]

CHUNK = 64  # label rows whose logits exist at once: 12 MB for 49k words; larger chunks were no faster
_NEAR = 8  # of these, rows that are worked on while they are near the processor: 2 MB


class Row(Protocol):
    """Token ids of one sequence; the label tokens are ids[start:]."""

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens, prompt first."""

    @property
    def start(self) -> int:
        """Where the labels begin, at least 1."""


class Example(Protocol):
    """One example as the data package encodes it."""

    @property
    def rows(self) -> Sequence[Row]:
        """One row, or one per candidate answer."""

    @property
    def answer(self) -> int:
        """Index of the right candidate or option."""

    @property
    def options(self) -> tuple[int, ...]:
        """Ids of the candidate tokens, when the label is one token."""

    @property
    def category(self) -> str:
        """What kind of task it is."""


@dataclass(frozen=True, slots=True)
class RowScore:
    """What one lane says about one row.

    Attributes:
      nll: sum of the label tokens' negative log-likelihoods, nats, float64.
      count: number of label tokens.
      hits: label tokens that were the likeliest of all tokens; 0 when that was not asked.
      options: logits of the option tokens.
    """

    nll: float
    count: int
    hits: int = 0
    options: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """Some of the logits: [n, words], of label rows from `row` and vocabulary words from `word` on."""

    row: int
    word: int
    logits: Tensor


@dataclass(frozen=True, slots=True)
class Tally:
    """A sum of losses and what to divide it by; tallies add.

    Attributes:
      total: sum of losses, nats.
      weight: label tokens of answer examples plus number of choice examples.
      right: choice examples answered right.
      choices: number of choice examples.
      hits: label tokens predicted right.
      tokens: label tokens of answer examples.
    """

    total: float = 0.0
    weight: int = 0
    right: int = 0
    choices: int = 0
    hits: int = 0
    tokens: int = 0

    def __add__(self, other: Tally) -> Tally:
        """Returns the tally of both sets of examples."""
        return Tally(
            self.total + other.total,
            self.weight + other.weight,
            self.right + other.right,
            self.choices + other.choices,
            self.hits + other.hits,
            self.tokens + other.tokens,
        )

    @property
    def loss(self) -> float:
        """The mean loss, nats.

        Raises:
          DataError: nothing was predicted.
        """
        if not self.weight:
            raise DataError("A batch has no label token: every token is masked. Raise max_tokens or drop such records.")
        return self.total / self.weight


def tally(example: Example, scores: Sequence[RowScore]) -> Tally:
    """Returns the loss of one example from the scores of its rows."""
    if example.options:
        return _choice(scores[0].options, example.answer)
    if len(scores) == 1:
        score = scores[0]
        return Tally(total=score.nll, weight=score.count, hits=score.hits, tokens=score.count)
    return _choice([-score.nll / score.count for score in scores], example.answer)


def loss_weight(example: Example) -> int:
    """Returns what `tally(example, ...)` will have as its weight."""
    choice = example.options or len(example.rows) > 1
    return 1 if choice else sum(len(row.ids) - row.start for row in example.rows)


def _choice(scores: Sequence[float], answer: int) -> Tally:
    if any(math.isnan(score) for score in scores):
        return Tally(total=math.nan, weight=1, choices=1)
    top = max(scores)
    if math.isinf(top):
        return Tally(total=math.nan, weight=1, choices=1)
    loss = top + math.log(math.fsum(math.exp(score - top) for score in scores)) - scores[answer]
    return Tally(total=loss, weight=1, right=int(scores.index(top) == answer), choices=1)


class _Labels:
    """Running log-likelihood of each label row while its logits come by in pieces."""

    def __init__(self, targets: Tensor, wanted: Mapping[int, tuple[int, ...]], *, hits: bool) -> None:
        self.targets, self.wanted, self.hits = targets, wanted, hits
        self.mass = torch.zeros_like(targets, dtype=torch.float64)
        self.top = torch.full_like(self.mass, -math.inf)
        self.label = torch.full_like(self.mass, math.nan)
        self.best = torch.full_like(targets, -1)
        self.options = {row: [math.nan] * len(ids) for row, ids in wanted.items()}

    def add_(self, piece: Piece) -> None:
        """Takes one piece in; its logits are overwritten."""
        rows, words = slice(piece.row, piece.row + piece.logits.shape[0]), piece.logits.shape[1]
        targets = self.targets[rows] - piece.word
        inside = (targets >= 0) & (targets < words)
        found = piece.logits.gather(1, targets.clamp(0, words - 1)[:, None])[:, 0].double()
        self.label[rows] = torch.where(inside, found, self.label[rows])
        for row in [row for row in self.wanted if rows.start <= row < rows.stop]:
            self._take_options(row, piece)
        top = piece.logits.amax(1).double()
        if self.hits:
            found = torch.where(top > self.top[rows], piece.logits.argmax(1) + piece.word, self.best[rows])
            self.best[rows] = found
        mass = torch.cat([_mass(some) for some in piece.logits.split(_NEAR)])
        old, new = self.top[rows], torch.maximum(self.top[rows], top)
        self.mass[rows] = self.mass[rows] * _ratio(old, new) + mass * _ratio(top, new)
        self.top[rows] = new

    def _take_options(self, row: int, piece: Piece) -> None:
        for at, word in enumerate(self.wanted[row]):
            if 0 <= word - piece.word < piece.logits.shape[1]:
                self.options[row][at] = float(piece.logits[row - piece.row, word - piece.word])

    def losses(self) -> list[float]:
        """Returns the negative log-likelihood of each label token."""
        losses: list[float] = ((self.top - self.label) + self.mass.log()).tolist()
        return losses


def _mass(logits: Tensor) -> Tensor:
    """Returns the sum over words of exp(logit - largest), float64 of shape [n]; the terms are float32.

    One unit in the last place of a float32 loss would be 5e-4 in a slope.
    """
    top = logits.amax(1, keepdim=True).float()
    apart = logits.sub_(top) if logits.dtype == torch.float32 else logits - top
    return apart.exp_().sum(1).double()


def _ratio(old: Tensor, new: Tensor) -> Tensor:
    return torch.where(old == new, torch.ones_like(old), (old - new).exp())


def label_scores(
    pieces: Iterable[Piece],
    *,
    rows: Sequence[Row],
    options: Sequence[tuple[int, ...]],
    device: torch.device,
    hits: bool = True,
) -> list[RowScore]:
    """Returns one score per row.

    Args:
      pieces: the logits at the label positions of all rows in order, in any cut; those of one piece are overwritten.
      rows: the sequences.
      options: option tokens of each row; empty for a row scored by likelihood.
      device: where the logits are.
      hits: whether to find the likeliest token of each row, which takes as long as the loss.
    """
    ends = list(accumulate(len(row.ids) - row.start for row in rows))
    targets = torch.tensor([token for row in rows for token in row.ids[row.start :]], device=device)
    labels = _Labels(targets, {end - 1: ids for end, ids in zip(ends, options, strict=True) if ids}, hits=hits)
    for piece in pieces:
        labels.add_(piece)
    losses, right = labels.losses(), (labels.best == targets).tolist()
    return [
        RowScore(math.fsum(losses[a:b]), b - a, sum(right[a:b]), tuple(labels.options.get(b - 1, ())))
        for a, b in zip([0, *ends], ends, strict=False)
    ]
