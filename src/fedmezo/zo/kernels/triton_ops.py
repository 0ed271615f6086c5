"""The noise contract for CUDA tensors, in Triton: the same functions as `torch_ops`, same bits, one pass over memory.

One program serves four chunks of 512 entries, held as a tile [chunk, halfword, lane]: a Philox call fills the eight
halfwords of its lane, and memory is read and written in runs of 64 entries. The 64 kB of the table's upper half stay
in the first-level cache. c * z is exact in float32, and in float64 for walks; a weight times a walk is not, so
kernels are compiled without fused multiply-add. Rounding to nearest bfloat16 is spelt out in integers: devices and
Triton's interpreter disagree about nan and ties.

With TRITON_INTERPRET=1 set before this module is imported, the same kernels run on CPU tensors, slowly.
"""

# Triton reads a kernel's annotations as its own types, and its decorator has none.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call,import-untyped,import-not-found"
# ruff: noqa: ANN001, ANN202

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate, chain
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from fedmezo.zo.noise import GAUSSIAN_CHUNK, GAUSSIAN_DOMAIN, RADEMACHER_DOMAIN, ROUNDING_DOMAIN, Law, table

_CHUNKS = tl.constexpr(4)  # 512-entry chunks of a program: together the 2048 of a Rademacher chunk
_SPAN = 4 * GAUSSIAN_CHUNK
_GAUSSIAN, _RADEMACHER = tl.constexpr(GAUSSIAN_DOMAIN), tl.constexpr(RADEMACHER_DOMAIN)
_ROUNDING = tl.constexpr(ROUNDING_DOMAIN)

# ---- the contract: from a seed to a tile of z, and from float32 to 16 bits --------------------------------------


@triton.jit
def _place(skip, size):
    """The tile's places in the tensor, int64, and which of them exist; `skip` entries of the first tile do not."""
    chunk = tl.program_id(0).to(tl.int64) * _CHUNKS + tl.arange(0, _CHUNKS)
    row, lane = tl.arange(0, 8), tl.arange(0, 64)
    at = chunk[:, None, None] * 512 + (row[None, :, None] * 64 + lane[None, None, :] - skip)
    return at, (at >= 0) & (at < size)


@triton.jit
def _halves(w0, w1, w2, w3):
    """Four words per [chunk, lane] as a tile of halfwords; halfword 2k is the low half of word k."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.reshape(tl.join(words & 0xFFFF, words >> 16), (_CHUNKS, 64, 8))
    return tl.permute(halves, (0, 2, 1))


@triton.jit
def _bits(seed, tensor, first, domain: tl.constexpr):
    """The random bits of the tile: 16 per entry, or one under the Rademacher law."""
    chunk = ((first + tl.program_id(0)) * _CHUNKS + tl.arange(0, _CHUNKS)).to(tl.uint32)[:, None]
    lane = tl.arange(0, 64).to(tl.uint32)[None, :]
    if domain == _RADEMACHER:
        # Each lane owns a word; these 8 bits of it are the chunk's. Counters are met 16 times: still 1/8 call an entry.
        w0, w1, w2, w3 = tl.philox(seed, (chunk >> 2) * 16 + (lane & 15), 0, tensor, domain, 10)
        word = tl.where(lane < 32, tl.where(lane < 16, w0, w1), tl.where(lane < 48, w2, w3))
        pairs = word >> ((chunk & 3) * 8)
        w0, w1, w2, w3 = pairs, pairs >> 2, pairs >> 4, pairs >> 6
        halves = _halves(*[(w & 1) | ((w & 2) << 15) for w in (w0, w1, w2, w3)])
    else:
        w0, w1, w2, w3 = tl.philox(seed, chunk * 64 + lane, 0, tensor, domain, 10)
        halves = _halves(w0, w1, w2, w3)
    return halves
