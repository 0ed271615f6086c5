"""Number formats in which slopes and seed sums travel: what a value becomes when it is written in few bits.

A sender rounds a value first and then uses the rounded one itself, so both ends always hold the same number.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["CODINGS", "Coding", "SumsCoding", "coded", "coded_sums"]

Coding = Literal["float32", "float16", "bfloat16", "float8", "sign"]
SumsCoding = Literal["float32", "float16", "bfloat16"]
CODINGS: tuple[Coding, ...] = ("float32", "float16", "bfloat16", "float8", "sign")
SUMS_CODINGS: tuple[SumsCoding, ...] = ("float32", "float16", "bfloat16")

# float8 is e5m2: float16's range with two bits of mantissa.
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float8": torch.float8_e5m2}


def coded(slope: float, coding: Coding) -> float:
    """Returns the slope as `coding` can write it; nan stays nan.

    Values beyond the format's range become its largest. "sign" gives -1, 0 or 1, as FeedSign (arXiv:2501.17610).

    Args:
      slope: a float32 value, or nan for a skipped step.
      coding: float32 | float16 | bfloat16 | float8 (e5m2) | sign.
    """
    if math.isnan(slope) or coding == "float32":
        return slope
    if coding == "sign":
        return float(np.sign(slope))
    kind = _DTYPES[coding]
    largest = torch.finfo(kind).max
    return float(torch.tensor(max(-largest, min(largest, slope)), dtype=torch.float32).to(kind))


def coded_sums(values: Sequence[float] | NDArray[np.float64], coding: SumsCoding) -> NDArray[np.float32]:
    """Returns seed sums as `coding` can write them; 16-bit formats hold them relative to a power of two, `sums_scale`.

    Laws: idempotent; the error of each is at most half a unit of the format, at the size of that value or 2**-14 of the
    largest, whichever is larger.

    Args:
      values: finite sums.
      coding: float32 | float16 | bfloat16.
    """
    narrow = np.asarray(values, np.float64).astype(np.float32)
    if coding == "float32":
        return narrow
    # Twice: when the largest rounds up to its power of two, what the others are relative to doubles, once.
    return _relative(_relative(narrow, coding), coding)


def _relative(values: NDArray[np.float32], coding: SumsCoding) -> NDArray[np.float32]:
    scale = sums_scale(values)
    parts = torch.from_numpy((values.astype(np.float64) / scale).astype(np.float32))
    rounded: NDArray[np.float32] = parts.to(_DTYPES[coding]).to(torch.float32).numpy()
    return (rounded.astype(np.float64) * scale).astype(np.float32)


def sums_scale(values: NDArray[np.float32]) -> float:
    """Returns what 16-bit sums are relative to: the smallest power of two above the largest |value|; 1 if all are 0."""
    largest = float(np.max(np.abs(values), initial=0.0))
    return 2.0 ** math.frexp(largest)[1] if largest else 1.0
