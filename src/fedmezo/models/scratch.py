"""Lane weights, written when a module needs them into memory that the next module reuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedmezo.zo.lazy import blocks
from fedmezo.zo.noise import Law
from fedmezo.zo.params import Params
from fedmezo.zo.perturb import row_, visit_

__all__ = ["Lane", "Scratch"]


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """One setting of the trained parameters: params + offset * z(seed)."""

    params: Params
    seed: int = 0
    offset: float = 0.0

    @property
    def key(self) -> tuple[int, int, float]:
        """Equal for lanes that are the same setting; without an offset the direction does not matter."""
        return id(self.params), self.seed if self.offset else 0, self.offset

    def mirrors(self, other: Lane) -> bool:
        """Returns whether `other` is this lane reflected in its parameters, so that both can share one noise."""
        same = self.params is other.params and self.seed == other.seed
        return same and self.offset != 0 and self.offset == -other.offset


@dataclass(eq=False)
class Scratch:
    """Reused memory for lane weights, one flat buffer per role and type.

    Attributes:
      device: where the trained parameters are.
      law: law of z.
    """

    device: torch.device
    law: Law
    buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def stack(
        self,
        name: str,
        lanes: Sequence[Lane],
        *,
        role: str,
        rows: slice | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Returns one parameter in each lane, stacked [lanes, rows, ...], after the steps its lanes still owe.

        The result is valid until the role's next use; for one lane without offset it is the parameter itself.

        Args:
          name: the parameter.
          lanes: the settings; mirrored neighbours share one generation of noise.
          role: which buffer to use.
          rows: some rows, within one block of a lazy parameter; None for all.
          dtype: the type wanted; None for the parameter's own.
        """
        if len(lanes) == 1 and lanes[0].offset == 0:
            whole = lanes[0].params[name]
            return (whole if rows is None else whole[rows])[None].to(dtype or whole.dtype)
        like = lanes[0].params.tensors[name]
        parts = list(blocks(like)) if rows is None else [rows]
        out = self._take(role, (len(lanes), parts[-1].stop - parts[0].start, *like.shape[1:]), dtype or like.dtype)
        for part in parts:
            place = slice(part.start - parts[0].start, part.stop - parts[0].start)
            for at, count in _pairs(lanes):
                lane = lanes[at]
                key = {"name": name, "rows": part, "seed": lane.seed, "offset": lane.offset, "law": self.law}
                visit_([out[at + which, place] for which in range(count)], lane.params, **key)  # type: ignore[arg-type]
        return out

    def lookup(self, name: str, lanes: Sequence[Lane], *, ids: Tensor) -> Tensor:
        """Returns rows `ids` of one matrix in each lane, [lanes, *ids.shape, width]; no other row is made.

        For one lane without offset autograd sees the parameter, as in `stack`.
        """
        if len(lanes) == 1 and lanes[0].offset == 0:
            return lanes[0].params[name][ids][None]
        like = lanes[0].params.tensors[name]
        distinct, places = torch.unique(ids, return_inverse=True)
        out = self._take("rows", (len(distinct), len(lanes), like.shape[1]), like.dtype)
        for at, row in enumerate(distinct.tolist()):
            for first, count in _pairs(lanes):
                lane = lanes[first]
                key = {"name": name, "row": row, "seed": lane.seed, "offset": lane.offset, "law": self.law}
                row_(list(out[at, first : first + count]), lane.params, **key)  # type: ignore[arg-type]
        return out.transpose(0, 1)[:, places]

    def _take(self, role: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        held = self.buffers.get((role, dtype))
        if held is None or held.numel() < size:
            # Ordinary memory, for views of inference tensors may not be written outside inference mode.
            with torch.inference_mode(mode=False):
                held = self.buffers[role, dtype] = torch.empty(size, device=self.device, dtype=dtype)
        return held[:size].view(shape)


def _pairs(lanes: Sequence[Lane]) -> list[tuple[int, int]]:
    """Returns (first, count): mirrored neighbours together, all others alone."""
    pairs, at = [], 0
    while at < len(lanes):
        count = 2 if at + 1 < len(lanes) and lanes[at].mirrors(lanes[at + 1]) else 1
        pairs.append((at, count))
        at += count
    return pairs
