"""Lane weights, written when a module needs them into memory that the next module reuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import lane_, lanes_

__all__ = ["Lane", "Scratch"]


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """One setting of the trained parameters: params + offset * z(seed)."""

    params: Params
    seed: int = 0
    offset: float = 0.0

    def mirrors(self, other: Lane) -> bool:
        """Returns whether `other` is this lane reflected in its parameters, so that both can share one noise."""
        same = self.params is other.params and self.seed == other.seed
        return same and self.offset != 0 and self.offset == -other.offset


@dataclass(eq=False)
class Scratch:
    """Reused float32 memory for lane weights, one flat buffer per role.

    Attributes:
      device: where the trained parameters are.
      law: law of z.
    """

    device: torch.device
    law: Law
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def stack(self, name: str, lanes: Sequence[Lane], *, role: str, first: int = 0, count: int | None = None) -> Tensor:
        """Returns rows [first, first + count) of one parameter in each lane, stacked [lanes, count, ...].

        The result is valid until the role's next use; for one lane without offset it is the parameter itself.

        Args:
          name: the parameter.
          lanes: the settings; mirrored neighbours share one generation of noise.
          role: which buffer to use.
          first: first row.
          count: number of rows; None for all.
        """
        whole = lanes[0].params[name]
        last = len(whole) if count is None else first + count
        if len(lanes) == 1 and lanes[0].offset == 0:
            return whole[first:last][None]
        out = self._take(role, (len(lanes), *whole[first:last].shape))
        start = first * (whole.numel() // len(whole))
        at = 0
        while at < len(lanes):
            pair = at + 1 < len(lanes) and lanes[at].mirrors(lanes[at + 1])
            self._write_(
                out[at : at + 2 if pair else at + 1], lanes[at], name=name, rows=slice(first, last), start=start
            )
            at += 2 if pair else 1
        return out

    def lookup(self, name: str, lanes: Sequence[Lane], *, ids: Tensor) -> Tensor:
        """Returns rows `ids` of one matrix in each lane, [lanes, *ids.shape, width]; no other row is made.

        For one lane without offset autograd sees the parameter, as in `stack`.
        """
        whole = lanes[0].params[name]
        if len(lanes) == 1 and lanes[0].offset == 0:
            return whole[ids][None]
        distinct, places = torch.unique(ids, return_inverse=True)
        width = whole.shape[1]
        out = self._take("rows", (len(distinct), len(lanes), width))
        for at, row in enumerate(distinct.tolist()):
            out[at] = self.stack(name, lanes, role="row", first=row, count=1)[:, 0]
        return out.transpose(0, 1)[:, places]

    def _write_(self, out: Tensor, lane: Lane, *, name: str, rows: slice, start: int) -> None:
        source = lane.params[name][rows]
        key: dict[str, Any] = {"name": name, "seed": lane.seed, "offset": lane.offset, "law": self.law, "start": start}
        if len(out) == 2:
            lanes_(out[0], out[1], source, **key)
        elif lane.offset:
            lane_(out[0], source, **key)
        else:
            out[0].copy_(source)

    def _take(self, role: str, shape: tuple[int, ...]) -> Tensor:
        size = torch.Size(shape).numel()
        held = self.buffers.get(role)
        if held is None or held.numel() < size:
            # Ordinary memory, for views of inference tensors may not be written outside inference mode.
            with torch.inference_mode(mode=False):
                held = self.buffers[role] = torch.empty(size, device=self.device)
        return held[:size].view(shape)
