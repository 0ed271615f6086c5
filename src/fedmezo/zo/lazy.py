"""A client's own copy of the parameters, which takes its steps when a tensor is next looked at.

A step and the two lanes of the next one then cost one pass over memory, and what nobody looks at costs nothing: most
rows of an embedding, and every weight after a client's last step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params

__all__ = ["BLOCK", "LazyParams", "blocks"]

BLOCK = 2048  # rows of a tensor that are looked at together: 9 MB for two lanes of width 576


def blocks(tensor: Tensor) -> Iterator[slice]:
    """Yields the row blocks of a tensor."""
    for first in range(0, len(tensor), BLOCK):
        yield slice(first, min(first + BLOCK, len(tensor)))


@dataclass(frozen=True, eq=False)
class LazyParams(Params):
    """Parameters that may owe steps; whoever reads them in the ordinary way gets them with all steps taken.

    Attributes:
      steps: every step promised so far, (seed, coefficient) in order.
      law: law of z.
    """

    law: Law = "gaussian"
    steps: list[tuple[int, float]] = field(default_factory=list)
    _taken: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yields (name, tensor) in name order, all steps taken."""
        return ((name, self[name]) for name in self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        """Returns one tensor, all steps taken."""
        from fedmezo.zo.perturb import settle_

        for rows in blocks(self.tensors[name]):
            settle_(self, name, rows)
        return self.tensors[name]

    def owed(self, name: str, row: int) -> list[tuple[int, float]]:
        """Returns the steps that the block with this row has not taken."""
        return self.steps[self._taken[name, row // BLOCK] :]

    def paid(self, name: str, row: int) -> None:
        """Says that the block with this row has taken all steps."""
        self._taken[name, row // BLOCK] = len(self.steps)
